#!/usr/bin/env bash
# Custom Diffusion of one concept, with real class pictures (as the published script).
#
#   bash scripts/finetune_real.sh "wooden pot" data/wooden_pot real_reg/samples_wooden_pot wooden_pot \
#       finetune_addtoken.yaml models/sd-v1-4.ckpt
#
# Arguments: category, photographs, class pictures, name, config (of configs/custom-diffusion/, or a path), base.
# More options of `ldm train` may follow. LDM is the program (default: python -m ldm). The folder of class
# pictures has images.txt and caption.txt: a picture, and its caption, in each line; if not, NUMBER of them (default 200)
# are searched in INDEX, see `ldm class-pictures --help`.
set -euo pipefail
if [ $# -lt 6 ]; then
    echo "expected: $0 CATEGORY PHOTOS CLASS_PICTURES NAME CONFIG BASE [options of ldm train]" >&2
    exit 2
fi
ldm=${LDM:-python -m ldm}
category=$1 photos=$2 class=$3 name=$4 config=$5 base=$6
shift 6
[ -f "$config" ] || config=configs/custom-diffusion/$config

if [ ! -f "$class/images.txt" ]; then
    $ldm class-pictures --index "${INDEX:?"$class has no images.txt; name an index of captioned pictures as INDEX"}" \
        --class_prompt "$category" --class_data_dir "$class" --num_class_images "${NUMBER:-200}"
fi
$ldm train --base "$config" -t --resume-from-checkpoint-custom "$base" --caption "<new1> $category" \
    --datapath "$photos" --reg_datapath "$class/images.txt" --reg_caption "$class/caption.txt" \
    --modifier_token "<new1>" --name "$name-sdv4" --datadir_in_name false "$@"
run=$(ls -td logs/*_"$name-sdv4" | head -n 1)
$ldm deltas --path "$run" --newtoken 1
$ldm sample --prompt "<new1> $category" --delta_ckpt "$(ls -t "$run"/checkpoints/delta_*.ckpt | head -n 1)" --ckpt "$base" \
    --config "$config" --outdir "$run/samples"
