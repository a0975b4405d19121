import pytest
import torch

import patchproof as pp
from patchproof.errors import PatchproofError, RunError
from patchproof.models import ModelSpec, build_model, load_classifier, save_classifier

SPEC = ModelSpec("tiny-resnet", 10, 1, (8, 8))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build_model(SPEC)


@pytest.mark.parametrize(
    "options",
    [
        {"masks_per_side": (3, 2), "multiplicity": (2, 1), "fill": 0.25, "tolerance": 0.01},
        {"inference": "challenger"},
        {
            "mask_set": pp.MaskSet(
                (8, 8), (pp.Box(0, 0, 8, 5), pp.Box(0, 3, 8, 5)), pp.SquarePatch(2)
            )
        },
    ],
)
def test_a_defense_comes_back_as_it_was(tmp_path, model, options):
    defense = pp.PatchCleanser(model, pp.SquarePatch(2), image_size=(8, 8), **options)
    defense.save(tmp_path / "robust.safetensors", SPEC, made={"by": "hand"})
    again = pp.load(tmp_path / "robust.safetensors")
    assert again.to_dict() == defense.to_dict()
    images = torch.rand(6, 1, 8, 8)
    assert torch.equal(again.predict(images), defense.predict(images))
    assert torch.equal(again.model(images), model(images))
    _, card = load_classifier(tmp_path / "robust.safetensors")
    assert card["made"]["by"] == "hand"


def test_a_classifier_without_a_defense_is_refused(tmp_path, model):
    save_classifier(tmp_path / "model.safetensors", model, SPEC, {})
    with pytest.raises(PatchproofError, match="file with a defense, got a classifier alone"):
        pp.load(tmp_path / "model.safetensors")
    with pytest.raises(PatchproofError, match="does not exist"):
        pp.load(tmp_path / "nothing.safetensors")


def test_changed_weights_are_refused(tmp_path, model):
    path = tmp_path / "robust.safetensors"
    pp.PatchCleanser(model, pp.SquarePatch(2), image_size=(8, 8)).save(path, SPEC)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(RunError, match="digest"):
        pp.load(path)
