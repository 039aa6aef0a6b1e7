"""Loading ViT-g/14 takes hardly more memory than the model itself, measured in a process of its own.

Of a smaller model, `test_weight_files.py` shows the same in seconds.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dinov2.models.vision_transformer import vit_giant2
from tests.conftest import REPO

SHARDS = 3
MEASURE = """
import re, sys
from pathlib import Path
import torch
from dinov2.models.pretrained import load_backbone
from dinov2.models.vision_transformer import vit_giant2

def resident_bytes(which):
    # Not getrusage: its peak is inherited from the process that started this one.
    return int(re.search(which + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

folder, device = sys.argv[1:]
# PyTorch imports some hundred megabytes of code on the way, which a first load of a tiny model brings in.
tiny = {"depth": 1, "embed_dim": 24, "num_heads": 2, "block_chunks": 0}
small = vit_giant2(**tiny).state_dict()
with torch.device(device):
    load_backbone(vit_giant2(**tiny, img_size=112), small)
Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
before = resident_bytes("VmRSS")
with torch.device(device):
    model = vit_giant2(
        patch_size=14, img_size=224, init_values=1.0, block_chunks=0, ffn_layer="swiglufused"
    )
report = load_backbone(model, folder)
assert report.share == 1.0 and not any(parameter.is_meta for parameter in model.parameters())
weights = sum(parameter.nbytes for parameter in model.parameters())
print((resident_bytes("VmHWM") - before) / weights)
"""


def write_sharded(folder):
    """Random float32 weights of a model that never exists, in several files and their index."""
    with torch.device("meta"):
        model = vit_giant2(
            patch_size=14, img_size=518, init_values=1.0, block_chunks=0, ffn_layer="swiglufused"
        )
    shapes = model.state_dict()
    names, table = list(shapes), {}
    for number in range(SHARDS):
        file = f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors"
        part = names[number::SHARDS]
        save_file({name: torch.randn(shapes[name].shape) * 0.02 for name in part}, folder / file)
        table |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")


def peak_over_weights(folder, device) -> float:
    command = [sys.executable, "-c", MEASURE, str(folder), device]
    result = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return float(result.stdout)


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_vit_giant_peaks_at_no_more_than_1_3_of_its_weights(tmp_path, device):
    write_sharded(tmp_path)
    ratio = peak_over_weights(tmp_path, device)
    print(f"peak over weights, model on {device}: {ratio:.3f}")
    assert ratio < 1.3
