"""What a run starts from: heads in folders and files, an earlier run's export, architectures of weights."""

import json
import shutil
from collections import Counter

import pytest
import torch

from dinov2.errors import ConfigError, WeightsError
from dinov2.fsdp.consolidate import consolidate
from dinov2.models import integrity, weight_files
from dinov2.models.integrity import sha256_of
from dinov2.train import SSLMetaArch
from dinov2.train import loop as trainer
from dinov2.train.head_files import find_files
from dinov2.train.initialization import load_initial_weights
from tests.models.servers import Served, Server, running
from tests.train.conftest import TinyRun, written_config

SEPARATE = (
    "ibot.separate_head=true",
    "ibot.head_n_prototypes=24",
    "ibot.head_hidden_dim=32",
    "ibot.head_bottleneck_dim=16",
)
PREFIX = "dinov2_vits_NCT_10k_training_1999_"


@pytest.fixture(scope="module")
def first_run(tile_folder, tmp_path_factory):
    """A run of six iterations with one export in its middle, after the third."""
    folder = tmp_path_factory.mktemp("first")
    TinyRun(folder, tile_folder).start(folder, *SEPARATE)
    return folder


@pytest.fixture
def exported(first_run, tmp_path):
    """A copy of that export, to be spoiled."""
    copy = tmp_path / "first" / "eval" / "training_2"
    shutil.copytree(first_run / "eval" / "training_2", copy)
    shutil.copy(first_run / "config.yaml", tmp_path / "first")
    return copy


@pytest.fixture
def prefixed(exported, tmp_path):
    """The same files under the names of the model farm."""
    folder = tmp_path / "farm"
    folder.mkdir()
    for file in exported.iterdir():
        shutil.copy(file, folder / f"{PREFIX}{file.name}")
    return folder


@pytest.fixture
def losses(monkeypatch):
    """The losses of every step of this process; the metrics file holds medians over windows of them."""
    steps, real = [], trainer.train_step

    def recording(*args, **options):
        result = real(*args, **options)
        steps.append(result.losses)
        return result

    monkeypatch.setattr(trainer, "train_step", recording)
    return steps


@pytest.mark.parametrize("separate", [False, True], ids=["shared", "separate"])
@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
def test_continuing_gives_the_losses_of_the_uninterrupted_run(tiny, tmp_path, losses, centering, separate):
    """A round trip train -> export -> continue; drop path is on."""
    options = (f"train.centering={centering}", *(SEPARATE if separate else ()))
    tiny.start(tmp_path / "whole", *options)
    whole = losses[:]
    losses.clear()
    folder, again = tmp_path / "whole" / "eval" / "training_2", tmp_path / "continued"
    tiny.start(again, *options, f"head.head_path={folder}", "optim.start_iter=3")
    assert len(whole) == 6 and len(losses) == 3
    # AdamW's moments begin at zero, so only the first step is the same.
    assert losses[0] == pytest.approx(whole[3], rel=1e-6)
    report = json.loads((again / "load_report.json").read_text())
    heads = ["dino_head", "ibot_head"] if separate else ["dino_head"]
    parts = {f"{n}.{p}" for n in ("student", "teacher") for p in ("backbone", *heads)}
    assert set(report) == parts | ({"centers"} if centering == "centering" else set())
    lines = (again / "training_metrics.json").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [3, 4, 5]


def test_a_continued_run_keeps_teacher_and_student_apart(tiny, exported):
    cfg = tiny.resolve(*SEPARATE, f"head.head_path={exported}")
    model = SSLMetaArch(cfg)
    model.prepare_for_distributed_training()
    for network in ("student", "teacher"):
        stored = torch.load(exported / f"{network}_checkpoint.pth", weights_only=True)[network]
        state = getattr(model, network).state_dict()
        assert state.keys() == stored.keys()
        assert all(torch.equal(tensor, stored[name]) for name, tensor in state.items())
    assert not torch.equal(model.student.backbone.norm.weight, model.teacher.backbone.norm.weight)
    centers = torch.load(exported / "centers_checkpoint.pth", weights_only=True)
    assert torch.equal(model.dino_loss.center, centers["dino_loss.center"]) and model.dino_loss.center.any()


def test_a_named_backbone_counts_more_than_those_beside_the_heads(tiny, exported):
    teacher = exported / "teacher_checkpoint.pth"
    cfg = tiny.resolve(*SEPARATE, f"head.head_path={exported}", f"student.pretrained_weights={teacher}")
    model = SSLMetaArch(cfg)
    model.prepare_for_distributed_training()
    assert torch.equal(model.student.backbone.norm.weight, model.teacher.backbone.norm.weight)
    assert not torch.equal(model.student.dino_head.mlp[0].weight, model.teacher.dino_head.mlp[0].weight)
    assert not model.dino_loss.center.any()  # these are not the networks that the centres belong to


@pytest.mark.parametrize(
    "named", ["", "student_dino_head_checkpoint.pth", "teacher_ibot_head_checkpoint.pth"]
)
def test_the_names_of_the_model_farm_are_found(tiny, prefixed, named):
    place = prefixed / f"{PREFIX}{named}" if named else prefixed
    cfg = tiny.resolve(*SEPARATE, f"head.head_path={place}")
    model = SSLMetaArch(cfg)
    stored = torch.load(prefixed / f"{PREFIX}teacher_ibot_head_checkpoint.pth", weights_only=True)
    assert torch.equal(model.teacher.ibot_head.mlp[0].weight, stored["teacher_ibot_head"]["mlp.0.weight"])
    assert len(model.initial_weights.parts) == 6


def test_two_sets_of_prefixed_files_are_not_mixed(prefixed):
    for file in list(prefixed.iterdir()):
        shutil.copy(file, prefixed / file.name.replace("1999", "2999"))
    with pytest.raises(WeightsError, match="files of several exports"):
        find_files(str(prefixed))
    files = find_files(str(prefixed / f"{PREFIX}student_dino_head_checkpoint.pth"))
    assert {path.name.split("training_")[1][:4] for path in files.heads.values()} == {"1999"}


def test_parts_of_two_exports_are_not_mixed(prefixed):
    for part in ("student", "teacher"):
        (prefixed / f"{PREFIX}{part}_checkpoint.pth").rename(prefixed / f"other_{part}_checkpoint.pth")
    with pytest.raises(WeightsError, match="files of several exports"):
        find_files(str(prefixed))
    files = find_files(str(prefixed / f"{PREFIX}student_dino_head_checkpoint.pth"))
    assert len(files.heads) == 4 and not files.backbones


def test_a_named_file_with_all_heads_counts_alone(tiny, exported):
    """Whatever lies beside it belongs to something else."""
    keys = [f"{network}_{head}" for network in ("student", "teacher") for head in ("dino_head", "ibot_head")]
    content = {key: torch.load(exported / f"{key}_checkpoint.pth", weights_only=True)[key] for key in keys}
    for number, state in enumerate(content.values()):
        state["mlp.0.bias"].fill_(number)
    torch.save({**content, "epoch": 3}, exported / "my_heads.pth")
    model = SSLMetaArch(tiny.resolve(*SEPARATE, f"head.head_path={exported / 'my_heads.pth'}"))
    heads = [
        model.student.dino_head,
        model.student.ibot_head,
        model.teacher.dino_head,
        model.teacher.ibot_head,
    ]
    assert [head.mlp[0].bias.unique().tolist() for head in heads] == [[0], [1], [2], [3]]
    assert {name.split(".")[1] for name in model.initial_weights.parts} == {"dino_head", "ibot_head"}
    assert not model.dino_loss.center.any()


def test_what_the_named_file_of_an_export_holds_counts_more_than_its_neighbours(exported):
    named = exported / "teacher_checkpoint.pth"
    files = find_files(str(named))
    assert {key for key, path in files.heads.items() if path == named} == {
        "teacher_dino_head",
        "teacher_ibot_head",
    }
    assert files.heads["student_dino_head"].name == "student_dino_head_checkpoint.pth"
    assert files.has_both_backbones


def test_one_bare_head_is_not_taken_for_all_of_them(exported, tiny):
    state = torch.load(exported / "student_dino_head_checkpoint.pth", weights_only=True)["student_dino_head"]
    torch.save(state, exported / "bare.pth")
    assert find_files(str(exported / "bare.pth")).heads == {}
    with pytest.raises(WeightsError, match="lacks"):
        SSLMetaArch(tiny.resolve(f"head.head_path={exported / 'bare.pth'}"))


def test_a_checksum_is_taken_and_compared(exported):
    file = exported / "student_dino_head_checkpoint.pth"
    files = find_files(f"{file}#sha256={sha256_of(file)}")
    assert len(files.heads) == 4 and files.has_both_backbones
    with pytest.raises(WeightsError, match="instead of the expected"):
        find_files(f"{file}#sha256={'0' * 64}")


def test_a_cached_name_of_the_model_farm_is_found(prefixed, tmp_path, monkeypatch):
    monkeypatch.setenv("DINOV2_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "zenodo" / "123"
    folder.mkdir(parents=True)
    for file in prefixed.glob("*_dino_head_checkpoint.pth"):
        shutil.copy(file, folder)
    name = f"{PREFIX}teacher_dino_head_checkpoint.pth"
    files = find_files(name, ["dino_head"])
    assert {path.parent for path in files.heads.values()} == {folder} and len(files.heads) == 2
    (folder / f"{PREFIX}student_dino_head_checkpoint.pth").unlink()
    with pytest.raises(WeightsError, match="student_dino_head_checkpoint.pth.* is a name of the model farm"):
        find_files(name, ["dino_head"])


def test_beside_an_address_the_other_files_that_are_needed_are_fetched(tiny, prefixed, tmp_path, monkeypatch):
    monkeypatch.setenv("DINOV2_CACHE", str(tmp_path / "cache"))
    with running(Server()) as server:
        for file in prefixed.iterdir():
            server.files[f"/farm/{file.name}"] = Served(file.read_bytes())
        address = f"{server.url}/farm/{PREFIX}student_dino_head_checkpoint.pth"
        SSLMetaArch(tiny.resolve(f"head.head_path={address}"))
        assert sorted(path.rpartition(PREFIX)[2] for path in server.sent) == [
            "student_dino_head_checkpoint.pth",
            "teacher_dino_head_checkpoint.pth",
        ]
        model = SSLMetaArch(tiny.resolve(*SEPARATE, f"head.head_path={address}"))
        assert len(model.initial_weights.parts) == 4 and len(server.sent) == 4
        whole = f"{server.url}/farm/{PREFIX}teacher_checkpoint.pth"
        model = SSLMetaArch(tiny.resolve(*SEPARATE, f"head.head_path={whole}"))
        assert len(model.initial_weights.parts) == 6 and model.dino_loss.center.any()


def test_a_missing_counterpart_at_an_address_is_named(prefixed, tmp_path, monkeypatch):
    monkeypatch.setenv("DINOV2_CACHE", str(tmp_path / "cache"))
    name = f"{PREFIX}student_dino_head_checkpoint.pth"
    with running(Server()) as server:
        server.files[f"/{name}"] = Served((prefixed / name).read_bytes())
        with pytest.raises(WeightsError, match="Cannot download .*teacher_dino_head_checkpoint.pth"):
            find_files(f"{server.url}/{name}")


@pytest.fixture
def work(monkeypatch):
    """Counts by file how often it was opened and how often its digest was computed."""
    counts = {"opened": Counter(), "hashed": Counter()}
    opening, hashing = weight_files._open_single, integrity.digest_of

    def opened(path):
        counts["opened"][path.name] += 1
        return opening(path)

    def hashed(path, algorithm):
        counts["hashed"][path.name] += 1
        return hashing(path, algorithm)

    monkeypatch.setattr(weight_files, "_open_single", opened)
    monkeypatch.setattr(integrity, "digest_of", hashed)
    return counts


def test_whole_files_with_heads_inside_are_opened_and_hashed_once(tiny, exported, work):
    for file in exported.glob("*_head_checkpoint.pth"):
        file.unlink()
    SSLMetaArch(tiny.resolve(*SEPARATE, f"head.head_path={exported}"))
    assert set(work["opened"].values()) == set(work["hashed"].values()) == {1}
    assert set(work["opened"]) == {f"{part}_checkpoint.pth" for part in ("student", "teacher", "centers")}


def test_no_file_is_opened_for_a_head_that_the_config_does_not_train(tiny, exported, work):
    for file in exported.glob("*_ibot_head_checkpoint.pth"):
        file.unlink()
    teacher = exported / "teacher_checkpoint.pth"
    SSLMetaArch(tiny.resolve(f"head.head_path={exported}", f"student.pretrained_weights={teacher}"))
    assert set(work["opened"]) == {
        "teacher_checkpoint.pth",
        "student_dino_head_checkpoint.pth",
        "teacher_dino_head_checkpoint.pth",
    }
    assert set(work["opened"].values()) == {1}


def test_heads_inside_whole_network_files_are_found(tiny, exported):
    for file in exported.glob("*_head_checkpoint.pth"):
        file.unlink()
    model = SSLMetaArch(tiny.resolve(*SEPARATE, f"head.head_path={exported}"))
    assert {"student.ibot_head", "teacher.dino_head"} <= model.initial_weights.parts.keys()


def test_heads_without_backbones_leave_the_backbone_as_configured(tiny, exported):
    for network in ("student", "teacher"):
        (exported / f"{network}_checkpoint.pth").unlink()
    model = SSLMetaArch(tiny.resolve(*SEPARATE, f"head.head_path={exported}"))
    assert {name.split(".")[1] for name in model.initial_weights.parts} == {"dino_head", "ibot_head"}


@pytest.mark.parametrize(
    ("removed", "overrides", "words"),
    [
        ("teacher_dino_head", (), "lacks teacher_dino_head_checkpoint.pth, while the other network's"),
        ("*_dino_head", SEPARATE, "has iBOT heads: set dino.loss_weight=0"),
        ("*_ibot_head", SEPARATE, "has DINO heads: set ibot.separate_head=false"),
        ("", ("dino.head_n_prototypes=48",), "set dino.head_n_prototypes=32 (it is 48)"),
        ("", ("dino.head_hidden_dim=24",), "set dino.head_hidden_dim=32 (it is 24)"),
        ("", ("student.embed_dim=16",), "backbone of width 32"),
    ],
)
def test_heads_that_are_missing_or_do_not_fit_stop_the_run(tiny, exported, removed, overrides, words):
    for network in ("student", "teacher"):
        (exported / f"{network}_checkpoint.pth").unlink()
    for file in exported.glob(f"{removed}_checkpoint.pth") if removed else ():
        file.unlink()
    with pytest.raises(WeightsError) as caught:
        SSLMetaArch(tiny.resolve(f"head.head_path={exported}", *overrides))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_reinit_starts_a_missing_head_afresh_and_says_so(tiny, exported, caplog):
    for file in [*exported.glob("*_ibot_head_checkpoint.pth"), *exported.glob("*t_checkpoint.pth")]:
        file.unlink()
    (exported / "teacher_checkpoint.pth").unlink()
    cfg = tiny.resolve(*SEPARATE, f"head.head_path={exported}", "head.on_missing=reinit")
    with caplog.at_level("WARNING", logger="dinov2"):
        model = SSLMetaArch(cfg)
    assert "ibot_head: random weights in student and teacher" in caplog.text
    model.prepare_for_distributed_training()
    assert torch.equal(model.student.ibot_head.mlp[0].weight, model.teacher.ibot_head.mlp[0].weight)
    assert {"student.dino_head", "teacher.dino_head"} == model.initial_weights.parts.keys()


def test_a_fresh_head_of_a_continued_run_starts_with_a_centre_of_zero(tiny, exported):
    for file in exported.glob("*_ibot_head_checkpoint.pth"):
        file.unlink()
    for network in ("student", "teacher"):  # the whole networks hold them, too
        path = exported / f"{network}_checkpoint.pth"
        state = torch.load(path, weights_only=True)[network]
        torch.save({network: {k: t for k, t in state.items() if not k.startswith("ibot_head.")}}, path)
    more = (*SEPARATE[:1], "ibot.head_n_prototypes=16", *SEPARATE[2:])
    model = SSLMetaArch(tiny.resolve(*more, f"head.head_path={exported}", "head.on_missing=reinit"))
    assert model.dino_loss.center.any() and not model.ibot_patch_loss.center.any()
    assert "teacher.ibot_head" not in model.initial_weights.parts


def spoiled_centers(exported, name, value):
    path = exported / "centers_checkpoint.pth"
    centers = torch.load(path, weights_only=True)
    centers[name] = value(centers[name])
    torch.save(centers, path)


@pytest.mark.parametrize(
    ("value", "words"), [(lambda c: c * float("nan"), "NaN or infinity"), (lambda c: c[..., :3], "of shape")]
)
def test_centres_that_are_damaged_are_refused_before_one_is_restored(tiny, exported, value, words):
    spoiled_centers(exported, "ibot_patch_loss.center", value)
    built = SSLMetaArch(tiny.resolve(*SEPARATE))
    cfg = tiny.resolve(*SEPARATE, f"head.head_path={exported}")
    with pytest.raises(WeightsError, match=words):
        load_initial_weights(built.student, built.teacher, built.centers(), cfg)
    assert not built.dino_loss.center.any()


def test_no_centres_are_restored_where_every_head_starts_afresh(tiny, exported, caplog):
    for file in exported.glob("*_head_checkpoint.pth"):
        file.unlink()
    for network in ("student", "teacher"):
        path = exported / f"{network}_checkpoint.pth"
        state = torch.load(path, weights_only=True)[network]
        torch.save({network: {k: t for k, t in state.items() if k.startswith("backbone.")}}, path)
    with caplog.at_level("INFO", logger="dinov2"):
        model = SSLMetaArch(tiny.resolve(f"head.head_path={exported}", "head.on_missing=reinit"))
    assert "centres of the losses" not in caplog.text and not model.dino_loss.center.any()
    assert model.initial_weights.parts.keys() == {"student.backbone", "teacher.backbone"}


def test_the_report_tells_of_no_weights_that_others_have_replaced(tiny, first_run, exported, tmp_path):
    (checkpoint,) = first_run.glob("model_final")
    tiny.start(
        tmp_path / "run", *SEPARATE, f"head.head_path={exported}", f"MODEL.WEIGHTS={checkpoint}",
        "optim.max_iterations=3",
    )  # fmt: skip
    assert (tmp_path / "run" / "self_check.json").is_file()
    assert not (tmp_path / "run" / "load_report.json").exists()


def test_heads_of_a_run_state_are_found(tiny, first_run, tmp_path):
    state = tmp_path / "model_final.pth"
    consolidate(first_run / "model_final", state)
    model = SSLMetaArch(tiny.resolve(*SEPARATE, f"head.head_path={state}"))
    assert {"student.ibot_head", "teacher.dino_head"} <= model.initial_weights.parts.keys()


@pytest.mark.parametrize("key", ["head.head_path", "student.pretrained_weights"])
@pytest.mark.parametrize(
    ("place", "what"),
    [("", "of a whole run"), ("eval", "of a whole run"), ("model_final", "a checkpoint of a run")],
)
def test_folders_of_a_run_are_told_what_to_name(tiny, first_run, key, place, what):
    with pytest.raises(WeightsError) as refused:
        SSLMetaArch(tiny.resolve(*SEPARATE, f"{key}={first_run / place}"))
    message = str(refused.value)
    assert f"is {what}: name " in message
    assert f"such as {first_run}/eval/training_5" in message
    command = f"python -m dinov2.fsdp.consolidate {first_run}/model_final weights.pth"
    assert (command in message) == (place == "model_final")


def test_what_is_left_unused_is_said(tiny, exported, caplog):
    with caplog.at_level("WARNING", logger="dinov2"):
        SSLMetaArch(
            tiny.resolve(*SEPARATE, f"head.head_path={exported}", f"student.pretrained_weights={exported}")
        )
    assert f"the backbones and centres in {exported} are not used" in caplog.text
    caplog.clear()
    for name in ("teacher_dino_head", "teacher", "student"):
        (exported / f"{name}_checkpoint.pth").unlink()
    with caplog.at_level("WARNING", logger="dinov2"):
        SSLMetaArch(tiny.resolve(f"head.head_path={exported}", "head.on_missing=reinit"))
    assert "its student_dino_head is not used" in caplog.text


def test_the_report_names_the_tensors_that_start_at_random(tiny, exported, tmp_path):
    tiny.start(tmp_path / "run", f"student.pretrained_weights={exported}", "optim.max_iterations=3")
    report = json.loads((tmp_path / "run" / "load_report.json").read_text())
    assert set(report) == {"student.backbone", "student.dino_head"}
    assert report["student.dino_head"]["missing"]["last_layer.weight_g"] == "random initial values"


def test_start_iter_has_to_lie_inside_the_run(tiny, tmp_path):
    with pytest.raises(ConfigError, match="optim.start_iter 6 is not before the end"):
        tiny.start(tmp_path / "run", "optim.start_iter=6")


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(WeightsError, match="neither a folder nor a file"):
        find_files(str(tmp_path / "nothing"))


# --- student.arch auto --------------------------------------------------------------------------------


def test_auto_builds_what_the_weights_are_and_writes_it_down(tiny, exported, tmp_path):
    source = exported / "teacher_checkpoint.pth"
    for name, override in (
        ("weights", f"student.pretrained_weights={source}"),
        ("other spelling", f"train.init_weights_from_chkpt={source}"),
        ("run", f"head.head_path={exported}"),
    ):
        out = tmp_path / name
        tiny.start(
            out, *SEPARATE, override, "student.arch=auto", "student.qkv_bias=false",
            "student.embed_dim=null", "student.depth=null", "student.num_heads=null", "student.patch_size=16",
            "optim.max_iterations=3",
        )  # fmt: skip
        student = written_config(out).student
        assert (student.arch, student.embed_dim, student.depth, student.num_heads) == ("vit_large", 32, 2, 2)
        assert (student.patch_size, student.qkv_bias, student.drop_path_rate) == (8, True, 0.2)


def test_auto_needs_weights_and_crops_that_fit(tiny, exported, tmp_path):
    with pytest.raises(ConfigError, match="no weights are named"):
        tiny.start(tmp_path / "a", "student.arch=auto")
    with pytest.raises(ConfigError, match="crops.global_crops_size is 36, which student.patch_size 8"):
        tiny.start(
            tmp_path / "b", "student.arch=auto", f"student.pretrained_weights={exported}",
            "crops.global_crops_size=36",
        )  # fmt: skip


def test_a_contradiction_of_config_and_weights_stops_with_both_values(tiny, exported):
    with pytest.raises(WeightsError) as caught:
        SSLMetaArch(
            tiny.resolve(
                f"student.pretrained_weights={exported}", "student.qkv_bias=false", "student.num_heads=4"
            )
        )
    message = str(caught.value)
    assert "qkv bias is True in the weights and False in the model (student.qkv_bias)" in message
    assert "num heads is 2 in the weights and 4 in the model (student.num_heads)" in message
    assert "student.arch=auto" in message
