#!/usr/bin/env bash
# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
# Makes sure of the system packages that building and testing need: installs them as root on Debian and Ubuntu,
# otherwise names the command.
set -euo pipefail

missing=()
command -v g++ >/dev/null || missing+=(g++)
command -v cmake >/dev/null || missing+=(cmake)
"${PYTHON:-python3}" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
printf '#include <gtest/gtest.h>\n' | g++ -E -x c++ - >/dev/null 2>&1 || missing+=(libgtest-dev)
[ ${#missing[@]} -eq 0 ] && exit 0

install="apt-get install -y ${missing[*]}"
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "installing system packages: ${missing[*]}"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive $install -qq
elif command -v apt-get >/dev/null; then
  echo "system packages are missing; install them with: sudo $install" >&2
  exit 1
else
  echo "system packages are missing; install what your system calls: ${missing[*]}" >&2
  exit 1
fi
