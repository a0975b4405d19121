#!/usr/bin/env bash
# Every run behind the tables of this folder. A run that was stopped goes on when called again.
#   DATA=path/to/parquet/folders docs/results/run.sh mnist|cifar10|imagenette
set -euo pipefail
cd "$(dirname "$0")/../.."
DATA=${DATA:?a folder with mnist, cifar10 and imagenette in Parquet}
OUT=${OUT:-docs/results}
patchproof=${PATCHPROOF:-.venv/bin/patchproof}

case ${1:?mnist, cifar10 or imagenette} in
  mnist)
    for masks in ${MASKS:-2 3 4 6 8}; do
      for patch in 5 2; do
        $patchproof certify --data "$DATA/mnist" --weights zoo/mnist-cutout.safetensors \
          --patch $patch --masks $masks --out "$OUT/mnist-${patch}x${patch}-k$masks"
      done
    done
    # The same number of masks, at least two over each region: larger masks, a stronger certificate.
    for patch in 5 2; do
      $patchproof certify --data "$DATA/mnist" --weights zoo/mnist-cutout.safetensors --count 1000 \
        --patch $patch --masks 6 --multiplicity 2x1 --out "$OUT/mnist-${patch}x${patch}-k6-twice"
    done
    ;;
  cifar10)
    note="CIFAR-10 re-compressed as JPEG by its source: close to, but not, the original pixels"
    for patch in 5 2; do
      for recipe in ${RECIPES:-cutout plain}; do
        $patchproof certify --data "$DATA/cifar10" --count 1000 --note "$note" \
          --weights zoo/cifar10-$recipe.safetensors --patch $patch --masks 6 \
          --out "$OUT/cifar10-${patch}x${patch}-k6-$recipe"
      done
    done
    ;;
  imagenette)
    note="Weights as initialised: for timing and the report only. 224x224 images resized by their source"
    for model in resnet18 vit_tiny_patch16_224; do
      weights=${TMPDIR:-/tmp}/$model-initial.safetensors
      "$(dirname "$patchproof")/python" - "$model" "$weights" <<'PYTHON'
import sys
import timm, torch
from safetensors.torch import save_file
torch.manual_seed(0)
save_file(timm.create_model(sys.argv[1], num_classes=10).state_dict(), sys.argv[2])
PYTHON
      $patchproof certify --data "$DATA/imagenette" --split validation --count 20 --note "$note" \
        --model timm:$model --weights "$weights" --patch 2% --masks 6 --gallery 2 \
        --out "$OUT/imagenette-32x32-k6-$model"
    done
    ;;
esac
