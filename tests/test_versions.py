import numpy as np
import torch

import skood


def test_versions_are_shown_a_line_each(capsys):
    skood.show_versions()
    lines = capsys.readouterr().out.splitlines()
    assert f"skood {skood.__version__}" in lines
    assert f"numpy {np.__version__}" in lines
    assert any(line.startswith("CPU ") for line in lines)
    n_gpus = torch.cuda.device_count()
    assert sum(line.startswith("GPU ") for line in lines) == n_gpus
