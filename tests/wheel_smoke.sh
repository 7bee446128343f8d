#!/bin/sh
# Install a wheel in a clean environment and run a tiny job from it, outside the checkout.
# usage: wheel_smoke.sh PYTHON WHEEL CONSTRAINTS
set -eu
python=$1
wheel=$(realpath "$2")
constraints=$(realpath "$3")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
bin=$folder/venv/bin
[ -d "$bin" ] || bin=$folder/venv/Scripts # Windows
"$bin/python" -m pip install --quiet --constraint "$constraints" torch torchvision
"$bin/python" -m pip install --quiet --constraint "$constraints" "$wheel"
cd "$folder"
drivesim="$bin/drivesim"
"$drivesim" --help > help.txt
grep -q rollout help.txt
for name in tokenizer world_model data; do
    if "$bin/python" -c "import $name" 2> /dev/null; then
        echo "the wheel installs a top-level package named $name" >&2
        exit 1
    fi
done
"$bin/python" -c "
from importlib.resources import files
assert (files('driving_sim') / 'py.typed').is_file(), 'the wheel lacks py.typed'
"
"$drivesim" synth videos --drives 3 --seconds 4
export DRIVESIM_PRESET=demo DRIVESIM_STEPS=3
"$drivesim" tokenize videos
"$drivesim" train-world-model
"$drivesim" rollout --actions left
test -s rollout.mp4
"$drivesim" rollout --model synthetic --actions left --seconds 1 --out synthetic.mp4
test -s synthetic.mp4
"$bin/python" -c "
import subprocess, urllib.request
command = ['$drivesim', 'play', 'synthetic', '--no-browser', '--port', '18200']
server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
address = next(line for line in server.stderr if line.startswith('drive at')).split()[2]
assert b'<canvas' in urllib.request.urlopen(address).read(), 'the wheel lacks the page'
server.terminate()
"
echo "the wheel works"
