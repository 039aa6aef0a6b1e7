"""Two hundred damaged files: each is refused in one sentence, runs no code and leaves the model as it was."""

import os
import pickle
import random
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dinov2.errors import WeightsError
from dinov2.models.digest import DIGEST_KEY, tensors_digest
from dinov2.models.pretrained import load_backbone
from tests.models.vits import holds, tiny

PROOF = "PROOF_OF_RUNNING"


def write_zip(path: Path, state) -> None:
    torch.save(state, path)


def write_legacy(path: Path, state) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


def write_safetensors(path: Path, state) -> None:
    """As this project writes them: with a digest of the tensors."""
    digest = tensors_digest((name, state[name]) for name in sorted(state))
    save_file(state, path, metadata={"format": "pt", DIGEST_KEY: digest})


FORMATS = {"zip.pth": write_zip, "legacy.pth": write_legacy, "safetensors": write_safetensors}
# A legacy file has no checksum anywhere: a flipped bit in a value cannot be told from a value.
CHECKED = ("zip.pth", "safetensors")


def state(seed=0):
    return {name: tensor.clone() for name, tensor in tiny(seed).state_dict().items()}


def truncated(path, rng):
    FORMATS[rng.choice(list(FORMATS))](path, state())
    raw = path.read_bytes()
    path.write_bytes(raw[: rng.randrange(len(raw))])


def bit_flipped(path, rng):
    """Flip a bit of a value, of a name, or of the table of contents."""
    written = state()
    kind = rng.choice(CHECKED)
    FORMATS[kind](path, written)
    raw = bytearray(path.read_bytes())
    name = rng.choice(list(written))
    start = bytes(raw).index(written[name].numpy().tobytes())
    if rng.random() < 0.7:
        position = start + rng.randrange(written[name].nbytes)
    else:
        position = bytes(raw).index(name.encode()) + rng.randrange(len(name))
    raw[position] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)


def wrong_keys(path, rng):
    changed, names = state(), list(state())
    for name in rng.sample(names, rng.randint(1, 5)):
        tensor = changed.pop(name)
        new = {"renamed": f"{name}_", "moved": f"encoder.{name}", "gone": ""}[
            rng.choice(["renamed", "moved", "gone"])
        ]
        if new or name == "mask_token":  # which alone may be missing
            changed[new or f"{name}_"] = tensor
    FORMATS[rng.choice(list(FORMATS))](path, changed)


def wrong_shapes(path, rng):
    changed = state()
    name = rng.choice([name for name in changed if name != "pos_embed"])
    tensor = changed[name]
    changed[name] = rng.choice(
        [tensor[:-1] if len(tensor) > 1 else torch.cat([tensor] * 2), tensor.unsqueeze(0)]
    )
    FORMATS[rng.choice(list(FORMATS))](path, {key: value.contiguous() for key, value in changed.items()})


def impossible_values(path, rng):
    changed = state()
    tensor = changed[rng.choice(list(changed))]
    tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice(
        [float("nan"), float("inf"), -float("inf"), 1e30]
    )
    FORMATS[rng.choice(list(FORMATS))](path, changed)


class Attack:
    """Makes a file named :data:`PROOF` when it is unpickled."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


ATTACKS = (
    Attack(os.system, f"touch {PROOF}"),
    Attack(open, PROOF, "w"),
    Attack(eval, f"open('{PROOF}', 'w')"),
    Attack(exec, f"open('{PROOF}', 'w')"),
    Attack(os.makedirs, PROOF),
)


def code(path, rng):
    attack = rng.choice(ATTACKS)
    content = rng.choice(
        [attack, {"teacher": {**state(), "extra": attack}}, {**state(), "norm.weight": attack}]
    )
    if rng.random() < 0.3:
        path.write_bytes(pickle.dumps(content, protocol=rng.choice([2, 4])))
    else:
        rng.choice([write_zip, write_legacy])(path, content)


def bomb(path, rng):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * rng.randrange(2_000_000, 4_000_000))
        for number in range(rng.randint(0, 3)):
            archive.writestr(f"archive/data/{number}", b"\0" * 1_000_000)


def web_page(path, rng):
    start = rng.choice(["<!DOCTYPE html>", "<html>", "\n\n  <html>", "<?xml version='1.0'?>", '{"error": '])
    path.write_text(start + "<head><title>Sign in</title></head>" * rng.randint(1, 50))


DAMAGES = {
    truncated: 40,
    bit_flipped: 50,
    wrong_keys: 30,
    wrong_shapes: 30,
    impossible_values: 25,
    code: 15,
    bomb: 5,
    web_page: 5,
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_every_damaged_file_is_refused(damage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, before, refused = tiny(seed=1), state(seed=1), set()
    for number in range(DAMAGES[damage]):
        suffix = ".safetensors" if number % 3 == 0 else ".pth"
        path = tmp_path / f"{number}{suffix}"
        damage(path, random.Random(number))
        with pytest.raises(WeightsError) as caught:
            load_backbone(model, str(path))
        message = str(caught.value)
        assert "\n" not in message and str(path) in message, message
        assert not Path(PROOF).exists()
        assert holds(model, before), path
        refused.add(path.read_bytes())
        path.unlink()
    assert len(refused) == DAMAGES[damage]  # no file twice


def test_a_flip_anywhere_is_refused_or_changes_nothing(tmp_path):
    """Padding between records carries nothing; every other byte does."""
    written, model, before, rng = state(), tiny(seed=1), state(seed=1), random.Random(0)
    for kind in CHECKED:
        path = tmp_path / f"weights.{kind}"
        FORMATS[kind](path, written)
        raw, refused = path.read_bytes(), 0
        for _ in range(60):
            changed = bytearray(raw)
            changed[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
            path.write_bytes(changed)
            model.load_state_dict(before)
            try:
                load_backbone(model, str(path))
            except WeightsError as error:
                refused += 1
                assert "\n" not in str(error)
                assert holds(model, before)
            else:
                assert holds(model, written)
        assert refused > 40


def test_the_undamaged_files_load(tmp_path):
    for kind, write in FORMATS.items():
        path = tmp_path / f"weights.{kind}"
        write(path, state())
        model = tiny(seed=1)
        assert load_backbone(model, str(path)).share == 1.0
        assert holds(model, state())
