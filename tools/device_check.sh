#!/bin/sh
# Check and time the GPU at hand, in 8 minutes unless told otherwise: docs/benchmarks/gpu.md.
#   tools/device_check.sh --minutes 8 --folder results
cd "$(dirname "$0")/.." || exit
exec "${PYTHON:-python3}" tools/bench_device.py "$@"
