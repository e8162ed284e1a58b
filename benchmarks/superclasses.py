"""Natural outliers of twenty kinds for networks of CIFAR-10: the superclasses of CIFAR-100.

The panel has natural images of two kinds, near objects and scenes. These are finer, so they show
which natural images a score lets in. They are training images of CIFAR-100, which a network of
CIFAR-10 has not seen; the panel has test images. The kinds are those of Krizhevsky, "Learning
multiple layers of features from tiny images", 2009, section 3.1.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from images import count

SUPERCLASSES = {
    "aquatic_mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food_containers": "bottle bowl can cup plate",
    "fruit_and_vegetables": "apple mushroom orange pear sweet_pepper",
    "household_devices": "clock keyboard lamp telephone television",
    "household_furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large_carnivores": "bear leopard lion tiger wolf",
    "large_man-made_outdoor_things": "bridge castle house road skyscraper",
    "large_natural_outdoor_scenes": "cloud forest mountain plain sea",
    "large_omnivores_and_herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium_mammals": "fox porcupine possum raccoon skunk",
    "other_invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small_mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles_1": "bicycle bus motorcycle pickup_truck train",
    "vehicles_2": "lawn_mower rocket streetcar tank tractor",
}
"""Classes of each superclass."""


def main(argv: Sequence[str] | None = None) -> None:
    """Write the images of each superclass into a file of its own."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cifar100", type=Path, required=True, help="cifar100.npz")
    parser.add_argument("--rows", type=count, default=300, help="of each (default: 300)")
    parser.add_argument("--folder", type=Path, required=True, help="for NAME.npz of each")
    options = parser.parse_args(argv)
    options.folder.mkdir(parents=True, exist_ok=True)
    with np.load(options.cifar100) as data:
        x, y, classes = data["x_train"], data["y_train"], data["classes"]
    for name, members in SUPERCLASSES.items():
        rows = np.flatnonzero(np.isin(classes[y], members.split()))
        drawn = np.random.RandomState(0).choice(rows, min(options.rows, len(rows)), replace=False)
        np.savez_compressed(options.folder / f"{name}.npz", x=x[np.sort(drawn)])


if __name__ == "__main__":
    main()
