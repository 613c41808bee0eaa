#!/bin/sh
# The CIFAR-10 runs of the README: `make cifar10 CIFAR10=FOLDER`, with train/<class>/ and test/<class>/ inside.
set -eu
export ACCELERATE_USE_CPU=true # as in the README: two CPU processes, also where there are GPUs

[ -d packed/cifar10/train ] && [ -d packed/cifar10/test ] || python shards/pack.py imagefolder "$1" packed/cifar10
train="accelerate launch --config_file configs/accelerate/cpu-2.yaml launch/train.py configs/cifar10/lightweight.yaml"
$train epochs=20 output_dir=runs/cifar10-oat
$train epochs=20 pretrain_epochs=20 output_dir=runs/cifar10-cross-entropy
