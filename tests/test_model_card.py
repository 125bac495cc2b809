"""The model card of an export: Hugging Face's library reads it, its example runs, and it goes to the Hub."""

from __future__ import annotations

import base64
import http.server
import json
import re
import runpy
import threading

import huggingface_hub
import pytest
import torch
from helpers import ROOT, log_lines, refusal
from huggingface_hub import ModelCard
from PIL import Image
from runs import pretrain

import main_finetune
import main_linprobe
from evaluation import checkpoints
from exporting import formats, hugging_face
from methods import base
from util.config import PretrainSettings
from util.training import checkpoint


@pytest.fixture(scope="module")
def command():
    return runpy.run_path(str(ROOT / "scripts/export.py"), run_name="export")["main"]


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory):
    """A pre-training of two epochs."""
    folder = tmp_path_factory.mktemp("run")
    pretrain(pictures, folder, "--masking", "sbam", "--masking_args", "randomness=0.3", "--mask_ratio", "5/8")
    return folder


@pytest.fixture
def untrained(tmp_path):
    """A function that writes a checkpoint with these settings, and returns its path."""

    def write(**args):
        settings = PretrainSettings(model="mae_vit_mini_patch4")
        content = {"model": base.build_model(settings).state_dict(), "args": settings.as_dict() | args, "epoch": 3}
        checkpoint.save(tmp_path / "ours.pth", content | {"grid": [4, 4], "num_images": 1000})
        return tmp_path / "ours.pth"

    return write


def export(path, folder, **card) -> ModelCard:
    formats.write(formats.read(path), "hf", folder, **card)
    return ModelCard.load(folder / "README.md")


def rows(card) -> dict[str, str]:
    """What the tables say."""
    return dict(re.findall(r"^\| (.+?) \| (.+) \|$", card.text, re.MULTILINE))


def run_example(card, folder, monkeypatch) -> dict:
    """Run the code of the card where a new user would have it; return its variables."""
    monkeypatch.chdir(folder)
    Image.new("RGB", (40, 30), "orange").save("picture.jpg")
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    variables = {}
    exec(code, variables)
    return variables


def test_the_card_of_a_pretraining(pictures, run, tmp_path, command, monkeypatch):
    command([str(run / checkpoint.LAST), "--to", "hf", "--output", str(tmp_path / "mine"), "--license", "cc-by-nc-4.0"])
    card = ModelCard.load(tmp_path / "mine" / "README.md")
    told = {"license": "cc-by-nc-4.0", "library_name": "transformers", "pipeline_tag": "image-feature-extraction"}
    assert card.data.to_dict() == told
    found = rows(card)
    assert found["architecture"] == "mae_vit_mini_patch4, images of 16 x 16 in patches of 4 x 4"
    assert found["images"] == "folder, 26 of them"
    assert (found["method"], found["mask"], found["mask ratio"]) == ("mae", "sbam randomness=0.3", "5/8")
    assert found["schedule"].startswith("epochs 2, warmup_epochs 0, blr 0.001, lr 0.001, weight_decay 0.05, seed 0,")
    assert "After epoch 1, counted from 0:" in card.text
    last = log_lines(run)[-1]
    assert found["train_loss"] == f"{last['train_loss']:.5g}"
    assert "train_lr" not in found
    assert str(pictures) not in card.text
    variables = run_example(card, tmp_path, monkeypatch)
    model = checkpoints.open_checkpoint(run / checkpoint.LAST).model
    with torch.no_grad():
        expected = model.encode(model.embed(variables["inputs"]["pixel_values"]), None)
    torch.testing.assert_close(variables["tokens"], expected, rtol=1e-5, atol=1e-5)
    assert f"# (1, 17, {expected.shape[-1]})" in card.text


@pytest.mark.parametrize(
    ("main", "task"),
    [(main_finetune, "fine-tuned"), (main_linprobe, "a linear probe of a frozen encoder")],
    ids=["finetuned", "probed"],
)
def test_the_card_of_a_classifier(pictures, tmp_path, monkeypatch, main, task):
    given = ["--data_path", pictures, "--model", "vit_mini_patch4", "--batch_size", 8, "--warmup_epochs", 0]
    given += ["--num_workers", 0, "--epochs", 1, "--output_dir", tmp_path / "run", "--cls_token"]
    main.main([str(value) for value in given])
    card = export(tmp_path / "run" / checkpoint.LAST, tmp_path / "mine")
    assert (card.data.license, card.data.pipeline_tag) == ("unknown", "image-classification")
    assert f"`ViTForImageClassification` of transformers, {task}." in card.text
    found, (line,) = rows(card), log_lines(tmp_path / "run")
    assert {"method", "mask", "mask ratio"}.isdisjoint(found)
    assert found["classes"] == "2"
    assert found["test_acc1"] == f"{line['test_acc1']:.5g}"
    assert run_example(card, tmp_path, monkeypatch)["logits"].shape == (1, 2)


@pytest.mark.parametrize("method", ["simmim", "bootmae", "ibot"])
def test_the_example_of_every_encoder(tmp_path, monkeypatch, method):
    settings = PretrainSettings(model=f"{method}_vit_mini_patch4")
    content = {"model": base.build_model(settings).state_dict(), "args": settings.as_dict(), "grid": [4, 4]}
    checkpoint.save(tmp_path / "ours.pth", content)
    card = export(tmp_path / "ours.pth", tmp_path / "mine")
    variables = run_example(card, tmp_path, monkeypatch)
    model = checkpoints.open_checkpoint(tmp_path / "ours.pth").model
    with torch.no_grad():
        expected = model.encode(model.embed(variables["inputs"]["pixel_values"]), None)
    torch.testing.assert_close(variables["tokens"], expected, rtol=1e-5, atol=1e-5)
    assert "Not known: there was no log.txt with this epoch beside the checkpoint." in card.text
    assert rows(card).get("mask ratio") == (None if method == "ibot" else "0.75")  # iBOT draws one for each view


def test_a_data_set_of_the_hub_is_named_and_a_folder_is_not(untrained, tmp_path, monkeypatch):
    card = export(untrained(dataset="hfds/zh-plus/tiny-imagenet"), tmp_path / "one")
    assert card.data.datasets == ["zh-plus/tiny-imagenet"]
    assert rows(card)["images"] == "zh-plus/tiny-imagenet, 1000 of them"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "private" / "data").mkdir(parents=True)
    for place in ("private/data", "/home/me/private/data"):
        path = untrained(dataset=f"hfds/{place}", method_args=["weight=2", "teacher=/private/t.pth"])
        card = export(path, tmp_path / "two")
        assert "private" not in card.text
        assert "datasets" not in card.data.to_dict()
        assert (rows(card)["images"], rows(card)["method"]) == ("hfds, 1000 of them", "mae weight=2")


def test_what_a_file_tells_wrongly_is_left_out(untrained, tmp_path):
    path = untrained(method="a|b\n\n# Title", epochs="many", blr=float("nan"), weight_decay=[1], seed=5)
    lines = ["{", "[3]", '{"epoch": 3, "train_loss": 1, "a|b\\n\\nc": 2, "x": "text"}', '{"epoch": 4, "train_loss": 9}']
    (tmp_path / "log.txt").write_text("\n".join(lines))
    card = export(path, tmp_path / "mine", name="user/mine", license="mit")
    found = rows(card)
    assert found["method"] == r"a\|b # Title"
    assert (found["train_loss"], found[r"a\|b c"]) == ("1", "2")
    assert found["schedule"] == "warmup_epochs 40, seed 5"
    assert "x" not in found
    assert card.data.license == "mit"
    assert '.from_pretrained("user/mine"' in card.text


@pytest.mark.parametrize("name", ["a b", "a/b/c", "a/-x", "x.git", "", "ä/b"])
def test_a_name_that_is_none_is_refused_before_exporting(untrained, tmp_path, command, capsys, monkeypatch, name):
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    to_hf = [untrained(), "--to", "hf", "--output", tmp_path / "mine", "--push_to_hub", name]
    assert f"--push_to_hub {name!r}: is no name on the Hub, such as user/my_vit (" in refusal(command, to_hf, capsys)
    assert not (tmp_path / "mine").exists()


def test_a_mistake_is_one_line_before_exporting(untrained, tmp_path, command, capsys, monkeypatch):
    path, mine = untrained(), tmp_path / "mine"
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    to_hf = [path, "--to", "hf", "--output", mine]
    assert "nobody is logged in to the Hub; run `hf auth login`" in refusal(
        command, [*to_hf, "--push_to_hub", "a/b"], capsys
    )
    assert "--license 'Apache 2': give its identifier" in refusal(command, [*to_hf, "--license", "Apache 2"], capsys)
    to_timm = [path, "--to", "timm", "--output", tmp_path / "mine.pth"]
    for flag in ("--license", "--push_to_hub"):
        assert f"{flag} mit: only --to hf" in refusal(command, [*to_timm, flag, "mit"], capsys)
    assert not list(tmp_path.glob("mine*"))
    command([str(value) for value in to_hf])
    (mine / "model.safetensors").unlink()
    (mine / "config.json").unlink()
    (mine / "preprocessor_config.json").unlink()
    assert "README.md exists" in refusal(command, to_hf, capsys)  # perhaps written by hand


class _Hub(http.server.BaseHTTPRequestHandler):
    """A Hub that takes what it is sent, and keeps it."""

    received: dict

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.received[self.path] = body
        host = f"http://{self.headers['Host']}"
        answers = {
            "/api/repos/create": lambda: {"url": f"{host}/user/mine"},
            "/api/validate-yaml": lambda: {"errors": [], "warnings": []},
            "/api/models/user/mine/preupload/main": lambda: {
                "files": [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in json.loads(body)["files"]
                ]
            },
            "/api/models/user/mine/commit/main": lambda: {"commitUrl": f"{host}/user/mine/commit/1", "commitOid": "1"},
        }
        self._answer(answers[self.path]() if self.path in answers else {})

    def do_GET(self):
        self._answer({})

    def _answer(self, content):
        text = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    """What a stand-in on this machine receives, by path."""
    received = {}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (_Hub,), {"received": received}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    yield received
    server.shutdown()
    server.server_close()


def test_the_folder_goes_to_the_hub(untrained, tmp_path, command, hub, capsys):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("not of the export")
    command([str(untrained()), "--to", "hf", "--output", str(mine), "--push_to_hub", "user/mine"])
    assert capsys.readouterr().out.strip().endswith("/user/mine")
    assert b"private" in hub["/api/repos/create"]
    assert b"license: unknown" in hub["/api/validate-yaml"]
    lines = [json.loads(line) for line in hub["/api/models/user/mine/commit/main"].splitlines()]
    sent = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
    }
    assert sent == {name: (mine / name).read_bytes() for name in hugging_face.HUGGING_FACE_FILES}
    assert "# user/mine\n" in sent["README.md"].decode()


def test_a_hub_out_of_reach_leaves_the_folder(untrained, tmp_path, command, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    to_hub = [untrained(), "--to", "hf", "--output", tmp_path / "mine", "--push_to_hub", "user/mine"]
    line = refusal(command, to_hub, capsys)
    assert "try again with the same command and --overwrite" in line
    assert (tmp_path / "mine" / "model.safetensors").exists()
