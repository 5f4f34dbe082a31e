#!/usr/bin/env bash
# Custom Diffusion of two concepts together, with real class pictures (as the published script).
#
#   bash scripts/finetune_joint.sh "wooden pot" data/wooden_pot real_reg/samples_wooden_pot \
#       cat data/cat real_reg/samples_cat wooden_pot+cat finetune_joint.yaml models/sd-v1-4.ckpt
#
# Arguments: category, photographs, class pictures, the same of the second concept, name, config (of
# configs/custom-diffusion/, or a path), base. More options of `ldm train` may follow. LDM is the program (default:
# python -m ldm). A folder of class pictures has images.txt and caption.txt: a picture, and its caption, in each line; if
# not, NUMBER of them (default 200) are searched in INDEX, see `ldm class-pictures --help`.
set -euo pipefail
if [ $# -lt 9 ]; then
    echo "expected: $0 CATEGORY PHOTOS CLASS_PICTURES CATEGORY PHOTOS CLASS_PICTURES NAME CONFIG BASE [options]" >&2
    exit 2
fi
ldm=${LDM:-python -m ldm}
category=$1 photos=$2 class=$3 category2=$4 photos2=$5 class2=$6 name=$7 config=$8 base=$9
shift 9
[ -f "$config" ] || config=configs/custom-diffusion/$config

real_pictures() {
    [ -f "$2/images.txt" ] || $ldm class-pictures --class_prompt "$1" --class_data_dir "$2" \
        --index "${INDEX:?"$2 has no images.txt; name an index of captioned pictures as INDEX"}" \
        --num_class_images "${NUMBER:-200}"
}
real_pictures "$category" "$class"
real_pictures "$category2" "$class2"
$ldm train --base "$config" -t --resume-from-checkpoint-custom "$base" \
    --caption "<new1> $category" --datapath "$photos" \
    --reg_datapath "$class/images.txt" --reg_caption "$class/caption.txt" \
    --caption2 "<new2> $category2" --datapath2 "$photos2" \
    --reg_datapath2 "$class2/images.txt" --reg_caption2 "$class2/caption.txt" \
    --modifier_token "<new1>+<new2>" --name "$name-sdv4" --datadir_in_name false "$@"
run=$(ls -td logs/*_"$name-sdv4" | head -n 1)
$ldm deltas --path "$run" --newtoken 2
$ldm sample --prompt "<new2> $category2 beside a <new1> $category" --ckpt "$base" --config "$config" \
    --delta_ckpt "$(ls -t "$run"/checkpoints/delta_*.ckpt | head -n 1)" --outdir "$run/samples"
