#!/bin/sh
# What `make quickstart` does, and what you would type yourself. Run from the top folder, inside the environment.
set -eu

# Every GPU where there are some, else two processes on the CPU.
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
case $gpus in
    0) processes="--config_file configs/accelerate/cpu-2.yaml" ;;
    1) processes="--config_file configs/accelerate/one.yaml" ;;
    *) processes="--config_file configs/accelerate/gpus.yaml --num_processes $gpus" ;;
esac

if [ ! -d packed/digits/train ] || [ ! -d packed/digits/test ]; then
    echo "== 1. pack scikit-learn's digits into shards"
    python shards/pack.py digits - packed/digits --overwrite
fi
echo "== 2. train: cross-entropy, then OAT (remove runs/quickstart to train anew)"
# shellcheck disable=SC2086  # several words on purpose
accelerate launch $processes launch/train.py configs/quickstart.yaml
echo "== 3. evaluate under every protocol"
python launch/evaluate.py runs/quickstart
echo
echo "report: $(pwd)/runs/quickstart/report.html"
