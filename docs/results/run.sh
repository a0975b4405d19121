#!/usr/bin/env bash
# Every run behind the tables of this folder. A run that was stopped goes on when called again.
#   DATA=path/to/parquet/folders docs/results/run.sh NAME
# NAME: mnist, cifar10, training, threats, location, detection, analyses, imagenette, patchguard,
# patchguard-analyses, ibp, transformations, crops, heuristics, corners or
# sandwich.
set -euo pipefail
cd "$(dirname "$0")/../.."
DATA=${DATA:?a folder with mnist, cifar10 and imagenette in Parquet}
OUT=${OUT:-docs/results}
patchproof=${PATCHPROOF:-.venv/bin/patchproof}

case ${1:?a name, see above} in
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
    for patch in ${PATCHES:-5 2}; do
      for recipe in ${RECIPES:-plain cutout greedy}; do
        $patchproof certify --data "$DATA/cifar10" --count 1000 --note "$note" \
          --weights zoo/cifar10-$recipe.safetensors --patch $patch --masks 6 \
          --out "$OUT/cifar10-${patch}x${patch}-k6-$recipe"
      done
    done
    ;;
  training)
    # Table 5 with a small ResMLP: without squares, with squares, and fine-tuned with the worst masks.
    for network in resmlp-plain resmlp-cutout resmlp-greedy vit-cutout; do
      $patchproof certify --data "$DATA/mnist" --count 500 --gallery 0 --patch 5 --masks 6 \
        --weights "zoo/mnist-$network.safetensors" --out "$OUT/mnist-5x5-k6-$network"
    done
    ;;
  threats)
    # Table 4: any rectangle of 1% of the pixels, two patches, and single squares to compare with.
    note="CIFAR-10 re-compressed as JPEG by its source: close to, but not, the original pixels"
    for data in ${SETS:-mnist cifar10}; do
      case $data in # greedy cutout of MNIST knows one mask set only
        mnist) network=cutout masks=${MASKS:-5} ;;
        cifar10) network=greedy masks=${MASKS:-4} ;;
      esac
      for patch in ${PATCHES:-3 4 any:1% 2*3}; do
        name=$(echo "$patch" | sed 's/any:1%/any/; s/2\*3/two-3/')
        extra=()
        if [ "$patch" = any:1% ]; then extra+=(--shapes 3); fi
        if [ "$data" = cifar10 ]; then extra+=(--note "$note"); fi
        $patchproof certify --data "$DATA/$data" --count 500 --gallery 0 --patch "$patch" \
          --weights "zoo/$data-$network.safetensors" --masks "$masks" "${extra[@]}" \
          --out "$OUT/threats-$data-$name-k$masks"
      done
    done
    ;;
  location)
    # MNIST 5x5 with many and small masks, up to one for each of the 576 places of the patch.
    for masks in ${MASKS:-6 8 12}; do
      $patchproof certify --data "$DATA/mnist" --weights zoo/mnist-greedy.safetensors --patch 5 \
        --masks "$masks" --count "$([ "$masks" = 12 ] && echo 500 || echo 1000)" \
        --out "$OUT/mnist-5x5-k$masks-greedy"
    done
    for masks in ${EVERY:-6 8 24}; do
      $patchproof certify --data "$DATA/mnist" --weights zoo/mnist-greedy-every.safetensors \
        --patch 5 --masks "$masks" --count "$([ "$masks" = 24 ] && echo 50 || echo 500)" \
        --gallery "$([ "$masks" = 24 ] && echo 0 || echo 9)" \
        --out "$OUT/mnist-5x5-k$masks-greedy-every"
    done
    ;;
  detection)
    # Minority Reports: the whole curve over tau comes from one run.
    note="CIFAR-10 re-compressed as JPEG by its source: close to, but not, the original pixels"
    $patchproof certify --defense minority-reports --tau 0.8 --data "$DATA/mnist" --patch 5 \
      --weights zoo/mnist-greedy.safetensors --masks 6 --out "$OUT/mnist-5x5-k6-detection"
    $patchproof certify --defense minority-reports --tau 0.8 --data "$DATA/cifar10" --patch 5 \
      --weights zoo/cifar10-greedy.safetensors --masks 6 --count 1000 --note "$note" \
      --out "$OUT/cifar10-5x5-k6-detection"
    "$(dirname "$patchproof")/python" docs/results/detection.py "$OUT" # after location and cifar10
    ;;
  analyses)
    for data in ${SETS:-mnist cifar10}; do
      study=(--data "$DATA/$data" --weights "zoo/$data-cutout.safetensors" --out "$OUT/analyses-$data")
      several=()
      case $data in
        mnist) study+=(--count 300) masks=2-7 several=(--multiplicity 1,2) ;;
        cifar10) study+=(--count 100) masks=2,3,4,6 ;;
      esac
      $patchproof analyze budget "${study[@]}" --patch 5 --masks "$masks" --layout paper,balanced "${several[@]}"
      $patchproof analyze inference "${study[@]}" --patch 5 --masks 2,3,4,6
      $patchproof analyze overestimate "${study[@]}" --patch 5 --estimates 5,6,8,10 --masks 4
      $patchproof analyze sizes "${study[@]}" --patches 2,4,5,6,8,12,16,20,24 --masks 4
    done
    # Object sizes: the box around a digit's ink stands for an annotation.
    boxes=${TMPDIR:-/tmp}/mnist-boxes.csv
    "$(dirname "$patchproof")/python" - "$DATA/mnist" "$boxes" <<'PYTHON'
import sys
from patchproof.datasets import load_dataset
data = load_dataset(sys.argv[1], "test")
with open(sys.argv[2], "w") as file:
    print("index,top,left,height,width", file=file)
    for index, image in enumerate(data.tensors()[0][:, 0]):
        rows, columns = (image.any(axis).nonzero().flatten() for axis in (1, 0))
        sides = (int(line[-1] - line[0]) + 1 for line in (rows, columns))
        print(index, int(rows[0]), int(columns[0]), *sides, sep=",", file=file)
PYTHON
    $patchproof analyze objects "$OUT/mnist-5x5-k6-greedy" --boxes "$boxes" --out "$OUT/analyses-mnist"
    $patchproof analyze objects "$OUT/cifar10-5x5-k6-greedy" --out "$OUT/analyses-cifar10"
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
  patchguard)
    # PatchGuard and what it compares with: on one BagNet, on one trained for each, on ablations.
    note="CIFAR-10 re-compressed as JPEG by its source: close to, but not, the original pixels"
    for data in ${SETS:-cifar10 mnist}; do
      case $data in
        cifar10) bagnet=bagnet7 patches="5 2" about=(--note "$note") ;;
        mnist) bagnet=bagnet9 patches=5 about=() ;;
      esac
      on_one="patchguard clipped-bagnet bagcert median trimmed-mean"
      for patch in ${PATCHES:-$patches}; do
        for run in ${RUNS:-$(printf '%s:masked2 ' $on_one) clipped-bagnet:clipped bagcert:bagcert \
          median:median trimmed-mean:trimmed patchguard:plain patchguard:masked \
          derandomized-smoothing:band4 patchguard:band4}; do
          defense=${run%:*} network=$bagnet-${run#*:}
          if [ "${run#*:}" = band4 ]; then network=band4; fi
          $patchproof certify --data "$DATA/$data" --weights "zoo/$data-$network.safetensors" \
            --patch "$patch" --defense "$defense" --gallery "${GALLERY:-0}" "${about[@]}" \
            --out "$OUT/patchguard-$data-${patch}x$patch-$defense-${run#*:}"
        done
      done
    done
    ;;
  patchguard-analyses)
    # Tables 6 to 15, Figures 3 and 8: of each model the local features are recorded once.
    study=(--data "$DATA/cifar10" --out "$OUT/analyses-patchguard" --count "${COUNT:-1000}")
    plain=(--weights zoo/cifar10-bagnet7-plain.safetensors)
    masked=(--weights zoo/cifar10-bagnet7-masked2.safetensors)
    paper=(--weights zoo/cifar10-bagnet7-masked.safetensors)
    band=(--weights zoo/cifar10-band4.safetensors)
    $patchproof analyze clipping "${study[@]}" "${plain[@]}" "${masked[@]}"
    $patchproof analyze windows "${study[@]}" "${masked[@]}"
    $patchproof analyze thresholds "${study[@]}" "${masked[@]}" --patches 5
    $patchproof analyze feature-types "${study[@]}" "${masked[@]}" "${band[@]}" --patches 2,5
    $patchproof analyze overlarge-masks "${study[@]}" "${masked[@]}" --patches 2,5 --masks 2,5,8
    $patchproof analyze training "${study[@]}" "${plain[@]}" "${paper[@]}" "${masked[@]}" --patches 2,5
    $patchproof analyze top-k "${study[@]}" "${masked[@]}" --patches 2,5
    $patchproof analyze patch-sizes "${study[@]}" "${masked[@]}" --patches 1-24
    $patchproof analyze local-logits "${study[@]}" "${plain[@]}" "${masked[@]}" --patch 5 \
      --count 500
    fields=()
    for field in 3 5 7; do
      $patchproof train --data "$DATA/cifar10" --shift 3 --threads 1 --recipe plain --epochs 4 \
        --epoch-images 11264 --model bagnet --model-option receptive_field=$field \
        --model-option 'widths=[48,96,128]' --model-option depth=1 --out "runs/bagnet-field$field"
      cp "runs/bagnet-field$field/model.safetensors" "runs/bagnet-field$field.safetensors"
      fields+=(--weights "runs/bagnet-field$field.safetensors")
    done
    $patchproof analyze receptive-fields "${study[@]}" "${fields[@]}" --patches 2,5
    ;;
  ibp)
    # Networks with interval bounds, each against the patch that it was trained for (its file's name
    # says which), those of 5x5 also against other shapes (Table 5), sparse ones against k pixels.
    note="CIFAR-10 re-compressed as JPEG by its source: close to, but not, the original pixels"
    for weights in ${WEIGHTS:-zoo/*-ibp-*.safetensors}; do
      name=$(basename "$weights" .safetensors)
      data=${name%%-*} about=()
      if [ "$data" = cifar10 ]; then about+=(--note "$note"); fi
      patch=$(echo "$name" | sed -E 's/.*-(sparse([0-9]+)|([0-9]+)x[0-9]+)-.*/\1/; s/sparse/sparse:/; s/x.*//')
      $patchproof certify --data "$DATA/$data" --weights "$weights" --patch "$patch" --gallery "${GALLERY:-0}" \
        --defense interval-bounds "${about[@]}" --out "$OUT/ibp-$name"
    done
    for network in ${SHAPED:-mlp conv4}; do
      for shape in 4x7 7x4 3x9 9x3 1x25 25x1 diamond parallelogram; do
        name=$network-$shape
        case $shape in
          diamond | parallelogram) shape=stencil:docs/results/shapes/$shape-25.png ;;
        esac
        $patchproof certify --data "$DATA/mnist" --weights "zoo/mnist-ibp-$network-5x5-guided10.safetensors" \
          --patch "$shape" --gallery 0 --defense interval-bounds --out "$OUT/ibp-shapes-$name"
      done
    done
    best=zoo/mnist-ibp-mlp-5x5-guided10.safetensors
    $patchproof certify --data "$DATA/mnist" --weights "$best" --patch 5 --gallery 0 --count 1000 \
      --defense interval-bounds --defense-option method=backward --out "$OUT/ibp-backward-5x5"
    ;;
  crops)
    # Randomized cropping: the votes of all crops of all test images are recorded once.
    study=(--data "$DATA/cifar10" --weights zoo/cifar10-crops10.safetensors --threads 1)
    study+=(--out "$OUT/crops-cifar10")
    $patchproof analyze crops "${study[@]}" --patches 2,3,4,5,6 --name patches
    $patchproof analyze crops "${study[@]}" --name transformations --patches \
      aspect:25@1:1,aspect:25@2.7:1,aspect:25@6:1,aspect:25@1:2.7,aspect:25@1:6,bounds:square:5@45,square:5@45,transformed:5
    $patchproof analyze crops "${study[@]}" --patches 5 --modes random-crops \
      --probabilities 0.93,0.95,0.97,0.99 --name probabilities
    $patchproof analyze crops "${study[@]}" --patches 5 --numbers 64,128,256,512 \
      --replacement both --name numbers
    $patchproof analyze crop-draws "${study[@]}" --patches 5
    $patchproof analyze crops-needed "${study[@]}" --patches 2,5 --probabilities 0.95,0.99
    "$(dirname "$patchproof")/python" docs/results/crop_votes_simulation.py \
      "$OUT"/crops-cifar10/recordings/* | tee "$OUT/crop-votes-simulation.jsonl"
    $patchproof analyze crops --data "$DATA/cifar10" --weights zoo/cifar10-crops6.safetensors \
      --threads 1 --out "$OUT/crops6-cifar10" --patches 2,3,4,5,6 --name patches
    $patchproof analyze crops --data "$DATA/mnist" --weights zoo/mnist-crops7.safetensors \
      --threads 1 --out "$OUT/crops-mnist" --patches 2,5 --name patches
    # Figure 2: small networks for crops of several sizes, told where the crop is or not.
    sizes=()
    for crop in 6 8 10 12 16; do
      for told in told alone; do
        $patchproof train --recipe crops --data "$DATA/cifar10" --threads 1 --lr 0.2 --epochs 6 \
          --crop $crop --model-option 'widths=[16,32,64,64]' \
          --model-option positions=$([ $told = told ] && echo true || echo false) \
          --out "runs/fig2-$told-$crop"
        sizes+=(--weights "runs/fig2-$told-$crop/model.safetensors")
      done
    done
    $patchproof analyze crops --data "$DATA/cifar10" "${sizes[@]}" --count 1000 --patches 5 \
      --threads 1 --out "$OUT/crops-cifar10-sizes" --name sizes
    ;;
  heuristics)
    # Table 2 of Chiang et al.: defenses without a certificate, attacked without and with knowledge of
    # them. Settings: the best of `patchproof analyze heuristics` on 200 validation images.
    note="CIFAR-10 re-compressed as JPEG by its source: close to, but not, the original pixels"
    for data in ${SETS:-mnist cifar10}; do
      for patch in ${PATCHES:-2 5}; do
        case $data-$patch in
          mnist-2) smoothing=1 window=5 threshold=0.05 masked=2 opening=1 ibp=mlp-2x2-all ;;
          mnist-5) smoothing=1.5 window=5 threshold=0.2 masked=6 opening=1 ibp=mlp-5x5-all ;;
          cifar10-2) smoothing=1 window=5 threshold=0.2 masked=4 opening=2 ibp=conv2-2x2-random10 ;;
          cifar10-5) smoothing=2.3 window=8 threshold=0.05 masked=5 opening=1 ibp=conv2-5x5-random10 ;;
        esac
        shared=(--data "$DATA/$data" --patch "$patch" --count 400 --threads 1)
        if [ "$data" = cifar10 ]; then shared+=(--note "$note"); fi
        network=(--weights "zoo/$data-plain.safetensors")
        smooth=(--defense local-gradient-smoothing --defense-option overlap=2)
        smooth+=(--defense-option "smoothing=$smoothing" --defense-option "window=$window")
        smooth+=(--defense-option "threshold=$threshold")
        mask=(--defense digital-watermarking --defense-option "window=$masked" --defense-option "opening=$opening")
        case $data in
          mnist) attack="$patchproof attack --attack ifgsm --places trial --place-count 6" ;;
          cifar10)
            attack="$patchproof attack --attack ifgsm --places gradient --place-count 3"
            attack+=" --attack-option steps=20 --attack-option step_size=0.1"
            ;;
        esac
        name=$OUT/heuristics/$data-$patch
        $attack "${shared[@]}" "${network[@]}" --defense undefended --out "$name-undefended"
        for knowledge in model defense; do
          $attack "${shared[@]}" "${network[@]}" "${smooth[@]}" --knowledge $knowledge \
            --out "$name-smoothing-$knowledge"
          $attack "${shared[@]}" "${network[@]}" "${mask[@]}" --knowledge $knowledge \
            --out "$name-watermarking-$knowledge"
        done
        bounds=(--defense interval-bounds --weights "zoo/$data-ibp-$ibp.safetensors")
        $patchproof certify "${shared[@]}" "${bounds[@]}" --gallery 0 --out "$name-bounds/certified"
        $attack "${shared[@]}" "${bounds[@]}" --out "$name-bounds/attacked" \
          --against "$name-bounds/certified"
      done
    done
    ;;
  corners)
    # Table 1 of Chiang et al. on CIFAR-10: patches in the four corners, with and without knowledge.
    note="CIFAR-10 re-compressed as JPEG by its source: close to, but not, the original pixels"
    attack=($patchproof attack --attack ifgsm --places corners --data "$DATA/cifar10" --note "$note")
    attack+=(--weights zoo/cifar10-plain.safetensors --patch 5 --locations corners --count 400)
    attack+=(--threads 1 --attack-option steps=20 --attack-option step_size=0.1)
    "${attack[@]}" --defense undefended --out "$OUT/heuristics/corners-undefended"
    for knowledge in model defense; do
      "${attack[@]}" --knowledge $knowledge --defense local-gradient-smoothing \
        --defense-option overlap=2 --defense-option window=5 --defense-option threshold=0.2 \
        --defense-option smoothing=1 --out "$OUT/heuristics/corners-smoothing-$knowledge"
      "${attack[@]}" --knowledge $knowledge --defense digital-watermarking \
        --defense-option window=5 --out "$OUT/heuristics/corners-watermarking-$knowledge"
    done
    ;;
  sandwich)
    # A certificate from below and an adaptive attack from above, of the same 400 images.
    note="CIFAR-10 re-compressed as JPEG by its source: close to, but not, the original pixels"
    strong=(--places trial --place-count 6 --stride 3 --restarts 2)
    everywhere=(--places open --place-count 8 --stride 1 --restarts 2)
    few=(--place-count 3) # of defenses that take many forwards
    bounds=$(for weights in zoo/*-ibp-*.safetensors; do
      name=$(basename "$weights" .safetensors)
      patch=$(echo "$name" | sed -E 's/.*-(sparse([0-9]+)|([0-9]+)x[0-9]+)-.*/\1/; s/sparse/sparse=/; s/x.*//')
      echo "${name%%-*}:$patch:interval-bounds:${name#*-}"
    done)
    for run in ${RUNS:-$bounds cifar10:5:patchguard:bagnet7-masked2 cifar10:5:patchguard++:bagnet7-masked2 \
      cifar10:5:bagcert:bagnet7-masked2 cifar10:2:clipped-bagnet:bagnet7-clipped \
      cifar10:5:median:bagnet7-masked2 cifar10:5:trimmed-mean:bagnet7-masked2 \
      cifar10:2:top-masking:bagnet7-masked2 mnist:5:derandomized-smoothing:band4 \
      mnist:5:patchguard:band4 mnist:5:patchcleanser:greedy \
      mnist:5:patchcleanser:greedy:--inference=challenger mnist:5:minority-reports:greedy \
      mnist:2:randomized-cropping:crops7:--defense-option=mode=all-crops \
      mnist:2:randomized-cropping:crops7:--defense-option=mode=fixed-crops \
      mnist:2:randomized-cropping:crops7:--defense-option=mode=random-crops}; do
      IFS=: read -r data patch defense network option <<< "$run"
      patch=${patch/=/:}
      case $defense in
        interval-bounds) attack=("${everywhere[@]}") ;;
        patchguard | patchguard++ | bagcert) attack=("${strong[@]}") ;;
        clipped-bagnet | median | trimmed-mean | top-masking) attack=("${strong[@]:0:6}") ;;
        *) attack=("${few[@]}") ;;
      esac
      if [[ $network == band* ]]; then attack=("${few[@]}"); fi
      shared=(--data "$DATA/$data" --weights "zoo/$data-$network.safetensors" --patch "$patch")
      shared+=(--defense "$defense" --count 400 --threads 1 ${option:+"${option%%=*}" "${option#*=}"})
      if [ "$data" = cifar10 ]; then shared+=(--note "$note"); fi
      name=$OUT/sandwich/$data-${patch//:/}-${defense//+/p}-$network${option:+-${option##*=}}
      $patchproof certify "${shared[@]}" --gallery 0 --out "$name/certified"
      $patchproof attack "${shared[@]}" "${attack[@]}" --attack-option steps=20 \
        --attack-option step_size=0.25 --out "$name/attacked" --against "$name/certified"
    done
    ;;
  transformations)
    # Randomized cropping, Table 4: a square of 5x5 stretched, turned by 45 degrees, and any of these.
    note="CIFAR-10 re-compressed as JPEG by its source: close to, but not, the original pixels"
    for run in ${RUNS:-derandomized-smoothing:band4:1000 patchguard:band4:1000 \
      patchguard:bagnet7-masked2:1000 interval-bounds:ibp-conv2-5x5-random10:1000 \
      patchcleanser:greedy:200}; do
      IFS=: read -r defense network count <<< "$run"
      extra=()
      if [ "$defense" = patchcleanser ]; then extra+=(--masks 4); fi
      for kind in ${KINDS:-1to1=5 2.7to1=aspect:25@2.7:1 6to1=aspect:25@6:1 \
        1to2.7=aspect:25@1:2.7 1to6=aspect:25@1:6 bounds=bounds:square:5@45 \
        rotated=square:5@45 worst=transformed:5 all=12x2+2x12+bounds:square:5@45}; do
        images=$count
        case $defense-${kind%%=*} in # 4,656 and 1,176 views
          patchcleanser-worst | patchcleanser-all) images=100 ;;
        esac
        $patchproof certify --data "$DATA/cifar10" --weights "zoo/cifar10-$network.safetensors" \
          --patch "${kind#*=}" --defense "$defense" --count "$images" --gallery 0 --note "$note" \
          "${extra[@]}" --out "$OUT/transformations-$defense-$network-${kind%%=*}"
      done
    done
    "$(dirname "$patchproof")/python" docs/results/transformations.py "$OUT"/transformations-*
    ;;
esac
