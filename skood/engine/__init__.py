"""The torch side of skood: networks, batches, training, inference. It knows no scikit-learn."""
