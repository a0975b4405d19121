"""transformers classifiers: the same scores as there, nothing run, and files that stand alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from patchproof.errors import PatchproofError, RunError
from patchproof.models import (
    ModelSpec,
    build_model,
    load_classifier,
    model_digest,
    save_classifier,
)
from patchproof.models.huggingface import TransformersClassifier

transformers = pytest.importorskip("transformers")

CLASSES = 4
Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Return a function that saves a tiny network and an image processor as one folder."""

    def save(config: Any = None, processor: Any = None) -> Path:
        torch.manual_seed(0)
        config = config or transformers.ViTConfig(
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            image_size=16,
            patch_size=8,
            num_labels=CLASSES,
        )
        folder = tmp_path / "model"
        transformers.AutoModelForImageClassification.from_config(config).save_pretrained(folder)
        processor = processor or transformers.ViTImageProcessor(size={"height": 16, "width": 16})
        processor.save_pretrained(folder)
        return folder

    return save


def resnet() -> Any:
    return transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_labels=CLASSES
    )


def spec_of(folder: Path, image_size: tuple[int, int] = (16, 16), **options: Any) -> ModelSpec:
    return ModelSpec(f"hf:{folder}", CLASSES, 3, image_size, options)


def build(folder: Path, image_size: tuple[int, int] = (16, 16), **options: Any) -> Any:
    return build_model(spec_of(folder, image_size, **options), pretrained=True)


def prepared(folder: Path, images: Tensor) -> Tensor:
    """Return what the image processor itself makes of 8-bit images."""
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    pixels: Tensor = processor(images=list(images), return_tensors="pt")["pixel_values"]
    return pixels.float()


def test_scores_are_those_of_the_library(save: Save) -> None:
    folder = save()
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    network = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = network(prepared(folder, images)).logits
    model = build(folder)
    assert not model.training
    assert torch.allclose(model(images / 255), expected, atol=1e-6)
    assert expected.std() > 1e-3


PROCESSORS: dict[str, Callable[[], Any]] = {
    "resized": lambda: transformers.ViTImageProcessor(size={"height": 40, "width": 30}),
    "shorter edge, then cropped": lambda: transformers.BitImageProcessor(
        size={"shortest_edge": 40}, crop_size={"height": 32, "width": 31}
    ),
    "cropped by a share": lambda: transformers.ConvNextImageProcessor(size={"shortest_edge": 32}),
    "stretched": lambda: transformers.ConvNextImageProcessor(size={"shortest_edge": 384}),
    "nearest, and neither scaled nor normalised": lambda: transformers.ViTImageProcessor(
        size={"height": 32, "width": 32}, resample=0, do_rescale=False, do_normalize=False
    ),
}


@pytest.mark.parametrize("processor", PROCESSORS.values(), ids=PROCESSORS)
def test_images_are_prepared_as_by_the_library(save: Save, processor: Any) -> None:
    folder = save(resnet(), processor())
    images = torch.linspace(0, 235, 24 * 33).reshape(1, 1, 24, 33) + 20 * torch.rand(3, 3, 24, 33)
    images = images.to(torch.uint8)
    model = build(folder, (24, 33))
    expected = prepared(folder, images)
    difference = (model.prepare(images / 255) - expected) * model.std
    assert difference.abs().max() <= 2 / 255  # the library rounds pixels after a resize


def test_without_published_weights_the_classes_are_free(save: Save) -> None:
    folder = save()
    spec = ModelSpec(f"hf:{folder}", 7, 3, (16, 16))
    torch.manual_seed(1)
    model = build_model(spec)
    assert model(torch.rand(2, 3, 16, 16)).shape == (2, 7)
    torch.manual_seed(2)
    assert model_digest(build_model(spec)) != model_digest(model)


def test_published_weights_are_for_their_classes(save: Save) -> None:
    folder = save()
    spec = ModelSpec(f"hf:{folder}", 7, 3, (16, 16))
    with pytest.raises(PatchproofError, match=r"expected 4 classes for the weights .* got 7"):
        build_model(spec, pretrained=True)
    fresh = ModelSpec(spec.name, 7, 3, (16, 16), {"new_head": True})
    model = build_model(fresh, pretrained=True)
    assert model(torch.rand(1, 3, 16, 16)).shape == (1, 7)
    published, kept = build(folder).state_dict(), model.state_dict()
    differing = [name for name in published if not torch.equal(published[name], kept[name])]
    assert sorted(differing) == ["model.classifier.bias", "model.classifier.weight"]


def test_weights_that_are_lacking_are_named(save: Save) -> None:
    folder = save()
    tensors = load_file(folder / "model.safetensors")
    del tensors["classifier.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match=r"got none for classifier\.weight"):
        build(folder)
    assert build(folder, new_head=True)(torch.rand(1, 3, 16, 16)).shape == (1, CLASSES)


def test_weights_in_half_precision_are_computed_with_in_full(save: Save) -> None:
    folder = save()
    tensors = load_file(folder / "model.safetensors")
    halved = {name: tensor.half() for name, tensor in tensors.items()}
    save_file(halved, folder / "model.safetensors", metadata={"format": "pt"})
    change_config(folder, dtype="float16")
    assert {tensor.dtype for tensor in build(folder).parameters()} == {torch.float32}


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_code_beside_a_model_is_never_run(save: Save) -> None:
    folder = save()
    (folder / "evil.py").write_text("from pathlib import Path; Path('ran').touch(); raise OSError")
    names = {"AutoConfig": "evil.C", "AutoModelForImageClassification": "evil.M"}
    change_config(folder, auto_map=names, attn_implementation="someone/kernel")
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    processor["auto_map"] = {"AutoImageProcessor": "evil.P"}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    model = build(folder)
    assert model(torch.rand(1, 3, 16, 16)).shape == (1, CLASSES)
    assert not {"auto_map", "attn_implementation"} & model.config.keys()
    change_config(folder, model_type="evil")
    with pytest.raises(PatchproofError, match="got model type 'evil'"):
        build(folder)
    assert not Path("ran").exists()


def test_pickled_weights_are_refused(save: Save) -> None:
    folder = save()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(RunError, match=r"cannot read the weights .*model\.safetensors"):
        build(folder)


def test_a_saved_classifier_needs_no_folder(save: Save, tmp_path: Path) -> None:
    folder = save(
        resnet(), transformers.BitImageProcessor(size={"shortest_edge": 40}, crop_size=32)
    )
    spec = spec_of(folder, (24, 33))
    model = build_model(spec, pretrained=True)
    save_classifier(tmp_path / "model.safetensors", model, spec, {"fill": 0.5})
    folder.rename(tmp_path / "gone")
    loaded, card = load_classifier(tmp_path / "model.safetensors")
    images = torch.rand(2, 3, 24, 33)
    assert torch.equal(loaded(images), model(images))
    assert model_digest(loaded) == model_digest(model) == card["digest"]
    assert card["model"]["name"] == spec.name
    assert ModelSpec.from_dict(json.loads(json.dumps(card["model"]))) == ModelSpec.from_dict(
        card["model"]
    )


def test_the_digest_covers_configuration_and_preprocessing(save: Save) -> None:
    folder = save()
    before = model_digest(build(folder))
    assert model_digest(build(folder)) == before
    change_config(folder, transformers_version="6.0")
    assert model_digest(build(folder)) == before
    change_config(folder, layer_norm_eps=0.1)
    other = model_digest(build(folder))
    assert other != before
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}, resample=3).save_pretrained(
        folder
    )
    assert model_digest(build(folder)) not in (before, other)


REFUSED: dict[str, Callable[[], Any]] = {
    "channels swapped": lambda: transformers.MobileViTImageProcessor(
        size={"shortest_edge": 32}, crop_size=32
    ),
    "another resize than it says": lambda: transformers.LevitImageProcessor(
        size={"shortest_edge": 32}, crop_size=32
    ),
}


@pytest.mark.parametrize("processor", REFUSED.values(), ids=REFUSED)
def test_image_processors_that_do_something_else_are_refused(save: Save, processor: Any) -> None:
    folder = save(resnet(), processor())
    with pytest.raises(PatchproofError, match="resizes, crops and normalises and does no more"):
        build(folder)
    model = build(folder, mean=0.5, std=[0.2, 0.3, 0.4], size=[32, 24])
    assert model.prepare(torch.zeros(1, 3, 16, 16)).shape == (1, 3, 32, 24)
    assert model.std.flatten().tolist() == pytest.approx([0.2, 0.3, 0.4])


def test_other_resampling_is_refused(save: Save) -> None:
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32}, resample=1)
    with pytest.raises(PatchproofError, match=r"nearest, bilinear or bicubic .* resample=1"):
        build(save(resnet(), processor))


def test_an_image_processor_is_needed(save: Save) -> None:
    folder = save()
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(PatchproofError, match="or the options mean, std and size instead"):
        build(folder)


def test_a_network_that_does_not_take_the_images_is_refused(save: Save) -> None:
    processor = transformers.ViTImageProcessor(size={"height": 20, "width": 20})
    with pytest.raises(PatchproofError, match=r"which fails: .*\(20\*20\)"):
        build(save(None, processor))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 1}, "expected images of 3 channels .* got 1"),
        ({"options": {"depth": 3}}, "expected options of mean, new_head, .* got depth"),
        ({"options": {"new_head": "yes"}}, "new_head: expected a JSON bool, got 'yes'"),
        ({"options": {"revision": 7}}, "revision: expected a JSON str, got 7"),
        ({"options": {"revision": "main"}}, "expected no revision of the folder"),
        ({"options": {"mean": [0.5]}}, "mean: expected a number, or one for each of 3"),
        ({"name": "hf:./nowhere"}, "hub or the folder of a model, got 'hf:./nowhere'"),
        ({"name": "hf:"}, "hub or the folder of a model, got 'hf:'"),
    ],
)
def test_mistakes_are_named(save: Save, changes: dict[str, Any], message: str) -> None:
    values = {"name": f"hf:{save()}", "classes": CLASSES, "channels": 3, "image_size": (16, 16)}
    with pytest.raises(PatchproofError, match=message):
        build_model(ModelSpec(**(values | changes)), pretrained=True)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bert"}, "expected an image classifier .* 'bert'"),
        ({"architecture": "resnet50"}, "use timm:resnet50"),
        ({"model_type": "timm_wrapper", "architecture": "resnet50"}, "use timm:resnet50"),
        ({"model_type": "vit", "quantization_config": {}}, "got quantized ones"),
        (["vit"], "with a model_type"),
    ],
)
def test_other_models_are_refused(tmp_path: Path, config: Any, message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(PatchproofError, match=message):
        build_model(spec_of(tmp_path))


def test_files_that_are_missing_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(PatchproofError, match=r"expected config\.json"):
        build_model(spec_of(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RunError, match=r"cannot read config\.json"):
        build_model(spec_of(tmp_path))


def test_the_hub_gives_json_and_safetensors_of_one_revision(
    save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save()
    asked: list[tuple[str, str | None, list[str]]] = []

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    spec = ModelSpec("hf:someone/vit", CLASSES, 3, (16, 16), {"revision": "v1"})
    assert isinstance(build_model(spec), TransformersClassifier)
    build_model(spec, pretrained=True)
    assert [(name, revision) for name, revision, _ in asked] == [("someone/vit", "v1")] * 2
    endings = {pattern.rpartition(".")[2] for _, _, patterns in asked for pattern in patterns}
    assert endings == {"json", "safetensors"}
    assert not any("safetensors" in pattern for pattern in asked[0][2])


def test_a_hub_out_of_reach_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route to host\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(
        RunError, match=r"cannot get hf:someone/vit from the hub: no route to host$"
    ):
        build_model(ModelSpec("hf:someone/vit", CLASSES, 3, (16, 16)))


def test_the_extra_is_named_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(PatchproofError, match=r"pip install 'patchproof\[hf\]'"):
        build_model(ModelSpec("hf:someone/vit", CLASSES, 3, (16, 16)))
