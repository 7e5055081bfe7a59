#!/usr/bin/env bash
# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
# Formatting, types, layers, banners and generated text. With --fix it rewrites what can be rewritten.
set -euo pipefail
cd "$(dirname "$0")/.."

mapfile -t native < <(git ls-files -co --exclude-standard '*.cpp' '*.h' '*.cu' '*.cuh')
if [ "${1:-}" = --fix ]; then
  clang-format -i "${native[@]}"
  ruff check --quiet --fix .
  ruff format --quiet .
  python tools/operator_table.py
  exit
fi

clang-format --dry-run -Werror "${native[@]}"
ruff check --quiet .
ruff format --quiet --check .
mypy --no-error-summary
python tools/check_layers.py
python tools/operator_table.py --check
unmarked=$(git ls-files -co --exclude-standard '*.cpp' '*.h' '*.h.in' '*.cu' '*.cuh' '*.py' '*.sh' |
  xargs grep -L 'SPDX-License-Identifier: MIT' || true)
if [ -n "$unmarked" ]; then
  printf 'no licence banner in:\n%s\n' "$unmarked" >&2
  exit 1
fi
echo "lint: clean"
