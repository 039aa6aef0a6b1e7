"""The losses against lightly's, an independent implementation.

lightly pulls in packages that would change this environment, so it lives in a folder of its own that only
the process computing lightly's values looks into.
"""

import os
import subprocess
import sys

import pytest
import torch

from dinov2.loss import DINOLoss, KoLeoLoss, iBOTPatchLoss
from dinov2.loss.targets import sinkhorn_knopp

PACKAGES = [
    "lightly==1.5.22",
    "lightly-utils",
    "requests",
    "urllib3",
    "idna",
    "charset-normalizer",
    "certifi",
]
PACKAGES += ["pydantic", "pydantic-core", "annotated-types", "typing-inspection", "python-dateutil", "six"]
PACKAGES += ["aenum", "certifi", "tqdm"]

LIGHTLY_SIDE = """
import sys
sys.path.append(sys.argv[1])
import torch
from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss
from lightly.loss.swav_loss import sinkhorn

given = torch.load(sys.argv[2], weights_only=True)
dino = DINOLoss(output_dim=given["teacher"].shape[-1], teacher_temp=0.05, warmup_teacher_temp_epochs=1)
ibot = IBOTPatchLoss(output_dim=given["patch_teacher"].shape[-1], teacher_temp=0.05)
out = {"dino": [], "ibot": []}
for step in range(2):
    out["dino"].append(dino(list(given["teacher"]), list(given["student"]), teacher_temp=0.05))
    out["ibot"].append(ibot(given["patch_teacher"], given["patch_student"], given["mask"]))
out["dino_center"], out["ibot_center"] = dino.center, ibot.center.value
out["koleo"] = KoLeoLoss()(given["features"])
out["sinkhorn"] = sinkhorn(given["teacher"][0], iterations=3, epsilon=0.05)
torch.save(out, sys.argv[3])
"""


@pytest.fixture(scope="module")
def given():
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    mask = torch.rand(6, 5, 5, generator=generator) < 0.3
    num_masked = int(mask.sum())
    return {
        "teacher": randn(2, 8, 48) * 0.3,
        "student": randn(6, 8, 48),
        "patch_teacher": randn(num_masked, 40) * 0.3,
        "patch_student": randn(num_masked, 40),
        "mask": mask,
        "features": randn(16, 24),
    }


@pytest.fixture(scope="module")
def lightly_values(given, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lightly")
    install = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--no-deps", "--target"]
    done = subprocess.run([*install, str(folder / "site"), *PACKAGES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.save(given, folder / "given.pt")
    arguments = [str(folder / "site"), str(folder / "given.pt"), str(folder / "out.pt")]
    done = subprocess.run(
        [sys.executable, "-c", LIGHTLY_SIDE, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "LIGHTLY_SERVER_LOCATION": "http://127.0.0.1:9"},
    )
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "out.pt", weights_only=True)


@pytest.mark.slow
def test_dino_over_all_pairs_of_different_views(given, lightly_values):
    loss_fn = DINOLoss(48)
    first, second, *local = given["student"]
    num_terms = 2 * len(local) + 2
    for expected in lightly_values["dino"]:
        targets = [loss_fn.softmax_center_teacher(view, 0.05) for view in given["teacher"]]
        loss_fn.update_center(given["teacher"].flatten(0, 1))
        crossed = loss_fn([first], [targets[1]]) + loss_fn([second], [targets[0]])
        got = (loss_fn(local, targets) + crossed) / num_terms
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    loss_fn.apply_center_update()
    torch.testing.assert_close(loss_fn.center, lightly_values["dino_center"].view(1, -1))


@pytest.mark.slow
def test_ibot_on_masked_patches(given, lightly_values):
    loss_fn = iBOTPatchLoss(40)
    teacher = given["patch_teacher"][None]
    for expected in lightly_values["ibot"]:
        targets = loss_fn.softmax_center_teacher(teacher, 0.05)[0]
        loss_fn.update_center(teacher)
        got = loss_fn.forward_masked(given["patch_student"], targets, given["mask"].flatten(1))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    loss_fn.apply_center_update()
    torch.testing.assert_close(loss_fn.center.flatten(), lightly_values["ibot_center"].flatten())


@pytest.mark.slow
def test_koleo(given, lightly_values):
    got = KoLeoLoss()(given["features"])
    torch.testing.assert_close(got, lightly_values["koleo"], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_sinkhorn_of_swav(given, lightly_values):
    got = sinkhorn_knopp(given["teacher"][0], 0.05)
    torch.testing.assert_close(got, lightly_values["sinkhorn"], rtol=1e-4, atol=1e-6)
