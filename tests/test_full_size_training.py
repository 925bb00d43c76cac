"""SiT-XL/2's refiner at full size, where there is a GPU; tests/full_size_training.py elsewhere."""

import json
import math
import subprocess
import sys
from pathlib import Path

import full_size_training
import pytest

SCRIPT = Path(full_size_training.__file__)


def test_the_recipes_cost_what_their_files_say():
    costs = full_size_training.count()
    refiner = costs["sit_xl_2_256_refiner"]
    # FIELD.md: 118.62 GMAC per evaluation of the teacher, 4.26 of the refiner.
    assert refiner["flop_per_image_and_step"] / 2e9 == pytest.approx(2 * 118.62 + 3 * 4.26, 1e-3)
    for name, cost in costs.items():
        head = (SCRIPT.parents[1] / "configs" / f"{name}.py").read_text()
        unit, number = ("PFLOP", 1e15) if cost["flop_in_all"] < 1e18 else ("EFLOP", 1e18)
        said = float(head.split(unit)[0].split()[-1])
        assert said == pytest.approx(cost["flop_in_all"] / number, rel=0.01)


@pytest.mark.gpu
@pytest.mark.slow
def test_the_official_batch_trains_on_a_gpu(tmp_path):
    command = [sys.executable, str(SCRIPT), f"--workdir={tmp_path}", "--steps=50"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (result,) = json.loads(done.stdout)
    assert math.isfinite(result["loss"])
    assert result["steps_per_second"] > 4.44  # the paper's, on an A800
