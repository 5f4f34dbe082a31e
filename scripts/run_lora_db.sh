#!/usr/bin/env bash
# A LoRA on the UNet by DreamBooth (as the published script).
#
#   MODEL_NAME=models/sd-v1-5.ckpt INSTANCE_DIR=photos OUTPUT_DIR=out bash scripts/run_lora_db.sh
#
# PROMPT is what the photographs show. More options of `ldm lora-dreambooth` may follow, later ones win. LDM is the program
# (default: python -m ldm).
set -euo pipefail
${LDM:-python -m ldm} lora-dreambooth --pretrained_model_name_or_path="${MODEL_NAME:?name the base as MODEL_NAME}" \
    --instance_data_dir="${INSTANCE_DIR:?name the folder of photographs as INSTANCE_DIR}" \
    --output_dir="${OUTPUT_DIR:?name the folder of the output as OUTPUT_DIR}" --instance_prompt="${PROMPT:-style of sks}" \
    --resolution=512 --train_batch_size=1 --gradient_accumulation_steps=1 --learning_rate=1e-4 \
    --lr_scheduler=constant --lr_warmup_steps=0 --max_train_steps=30000 "$@"
