"""Which of a folder's files is taken."""

import pytest

from dinov2.models.folders import choose_file, no_choice

FARM = "dinov2_vits_NCT_10k_training_1999_"


@pytest.mark.parametrize(
    ("names", "teacher", "student"),
    [
        (
            ["teacher_checkpoint.pth", "student_checkpoint.pth", "model.safetensors", "x.pt"],
            "teacher_checkpoint.pth",
            "student_checkpoint.pth",
        ),
        (
            ["model.safetensors", "pytorch_model.bin", "optimizer.pt"],
            "model.safetensors",
            "model.safetensors",
        ),
        (
            ["model.safetensors.index.json", "model-1.safetensors", "model-2.safetensors", "config.json"],
            "model.safetensors.index.json",
            "model.safetensors.index.json",
        ),
        (["pytorch_model.bin", "training_args.bin"], "pytorch_model.bin", "pytorch_model.bin"),
        (
            ["pytorch_model.bin.index.json", "a.bin", "b.bin"],
            "pytorch_model.bin.index.json",
            "pytorch_model.bin.index.json",
        ),
        (
            [f"{FARM}{kind}_checkpoint.pth" for kind in ("teacher", "student", "teacher_dino_head")],
            f"{FARM}teacher_checkpoint.pth",
            f"{FARM}student_checkpoint.pth",
        ),
        ([f"{FARM}teacher_checkpoint.pth", "other_teacher_checkpoint.pth"], None, None),
        (["weights.pt", "notes.txt", "weights.pt.sha256"], "weights.pt", "weights.pt"),
        (["a.pt", "b.pth"], None, None),
        ([], None, None),
    ],
)
def test_the_order_of_preference(names, teacher, student):
    assert choose_file(names, "teacher") == teacher
    assert choose_file(reversed(names), "teacher") == teacher
    assert choose_file(names, "student") == student


def test_what_is_there_is_listed():
    sentence = no_choice("The folder x", [f"{letter}.pth" for letter in "fedcba"], "teacher")
    assert "teacher_checkpoint.pth" in sentence and "a.pth, b.pth, c.pth, d.pth, e.pth and 1 more" in sentence
    assert "no weight file at all" in no_choice("The folder x", ["notes.txt"], "teacher")
