#!/bin/sh
# `make vit-l`: two steps of ViT-L-16 under ZeRO-2 and under ZeRO-3 on two CPU processes, and their checkpoints read
# again by plain torch. Random weights and enlarged digits: this shows that it runs, in what time, not what it learns.
# 64x64 images, since a CPU without bf16 instructions takes minutes for one image of 224x224: IMAGE_SIZE=224 where it
# has them.
set -eu
export ACCELERATE_USE_CPU=true # also where there are GPUs

[ -d packed/digits/train ] && [ -d packed/digits/test ] || python shards/pack.py digits - packed/digits --overwrite
runs=$(mktemp -d) # a checkpoint takes 2.4 GB, so each is removed when it has been read
trap 'rm -rf "$runs"' EXIT
trap 'exit 1' INT TERM
for engine in zero2 zero3; do
    echo "== ViT-L-16 under $engine: bf16, global batch 4 in micro-batches of 1, one anchor a step"
    accelerate launch --config_file "configs/accelerate/$engine.yaml" launch/train.py configs/vit/vit_l_16.yaml \
        engine.name="$engine" batch_size=4 micro_batch_size=1 epochs=1 pretrain_epochs=0 max_steps=2 log.every_steps=1 \
        data.path=packed/digits data.eval_split=null data.image_size="${IMAGE_SIZE:-64}" output_dir="$runs/$engine"
    python benchmarks/vit_l.py "$runs/$engine"
    rm -r "${runs:?}/$engine"
done
