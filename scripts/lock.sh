#!/bin/sh
# Write requirements.lock: exact versions of everything the extras demo and dev need.
set -eu
python=${1:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m venv "$work/venv"
# torch first and pinned: a build for this machine is kept, a newer one is not fetched by chance.
torch=$(sed -n 's/^torch==//p' requirements.lock 2>/dev/null || true)
"$work/venv/bin/pip" install --quiet "torch==${torch:-2.13.0}"
"$work/venv/bin/pip" install --quiet -e '.[dev]'
{
  echo "# Written by scripts/lock.sh (make lock). Used as constraints: pip install -c requirements.lock"
  # A local build tag (+cpu) belongs to one machine; other platforms have other builds.
  "$work/venv/bin/pip" freeze --exclude-editable | sed 's/+[a-z0-9.]*$//'
} > "$work/lock"
mv "$work/lock" requirements.lock
echo "requirements.lock: $(grep -c == requirements.lock) packages"
