#!/usr/bin/env bash
# Everything that only a GPU can show, in one command of under 25 minutes:
#
#     benchmarks/gpu.sh [FOLDER]
#
# It needs the test dependencies (`pip install -e '.[test]'`). AutoRound, llm-compressor and vLLM are measured if they
# are installed. Every table is a file in FOLDER (default: gpu-results); a step that fails leaves its log and does not
# stop the others.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-gpu-results}")
mkdir -p "$out"
failed=0

step() { # NAME SECONDS COMMAND...: run a command with a time limit and keep its output
  local name=$1 limit=$2 began=$SECONDS
  shift 2
  if timeout "$limit" "$@" >"$out/$name.txt" 2>"$out/$name.log"; then
    echo "$name: $((SECONDS - began)) s"
  else
    echo "$name: failed after $((SECONDS - began)) s, see $out/$name.log"
    failed=1
  fi
}

python -c 'import torch, sys; sys.exit(0 if torch.cuda.is_available() else "no CUDA device: PyTorch sees none here")' || exit 1
step machine 60 bash -c 'nvidia-smi; python -m lrquant doctor'

# Kernels against the reference, on the device.
step tests 420 python -m pytest -q tests/formats tests/runtime/test_devices.py tests/reconstruction/test_compiled_block.py

# One block of Llama-7B: 20 epochs of 128 samples of 2048 tokens, one sample a step, and four.
step block-batch-1 240 python benchmarks/block_step.py --shape llama-7b --tokens 2048 --batch 1 --whole 2560
step block-batch-4 180 python benchmarks/block_step.py --shape llama-7b --tokens 2048 --batch 4 --whole 192

# A full model of 1.1 billion random weights, 128 samples of 2048 tokens: seconds and peak memory are in the JSON file.
model=$out/random-1b
step random-model 120 python - "$model" <<'PY'
import sys

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lrquant.zoo import zoo_model_path

tokenizer = AutoTokenizer.from_pretrained(zoo_model_path("zoo:llama"))
config = LlamaConfig(
    vocab_size=len(tokenizer), hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
    num_key_value_heads=4, max_position_embeddings=2048, dtype=torch.bfloat16,
)  # fmt: skip
torch.manual_seed(0)
LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(sys.argv[1])
tokenizer.save_pretrained(sys.argv[1])
PY
for method in lrquant lrquant-max; do
  step "run-$method-w4a4" 300 python -m lrquant quantize "$model" --method "$method" --wbits 4 --abits 4 --symmetric \
    --calib zoo:pydoc --nsamples 128 --seqlen 2048 --no-report --restart \
    --json "$out/run-$method-w4a4.json" --save-dir "$out/$method-w4a4"
  rm -rf "${out:?}/$method-w4a4"
done

# Decoding speed where the result is served.
if python -c 'import vllm' 2>/dev/null; then
  for format in w4a16-g128 w8a8; do
    step "quantize-$format" 180 python -m lrquant quantize "$model" --method rtn --format "$format" \
      --calib zoo:pydoc --nsamples 4 --seqlen 512 --no-report --restart --save-dir "$out/$format"
    step "decode-$format" 180 python -m lrquant bench "$out/$format" --json "$out/decode-$format.json"
  done
fi
rm -rf "$model"
exit $failed
