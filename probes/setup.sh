# bash probes/setup.sh in the checkout: environment (3 min), wheels for the device, packed corpora (2 min).
set -e
printf '/.dev/\n/.whl/\n/.study/\n/probes/\n' >> .git/info/exclude
python3 -m venv /work/env/v; source /work/env/v/bin/activate
pip install -q torch==2.13.0; pip install -q triton "numpy<2.4"; pip install -q -e '.[test,clients]'
pip install -q --target /work/env/triton36 --no-deps triton==3.6.0
mkdir -p .dev .whl .study; cp probes/*.py probes/go.sh .dev/; cp /work/shared/sketches/gluon_product.py .dev/ || true
pip install -q --no-deps --target .dev/up4 simple-hierarchical-transformer==0.4.0 rotary-embedding-torch torch-einops-utils
get() { pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d "$@"; }
get .whl tyro docstring-parser typeguard shtab local-attention hyper-connections simple-hierarchical-transformer==0.2.0 torchao ema-pytorch zstandard torch-einops-utils
get .dev "numpy<2.4"
python -m benchmarks.studies.quality.corpora /work/corpora
for f in cpp english python; do xz -T0 -6 -c /work/corpora/$f.bin > .study/$f.bin.xz; done
# sums of gradients where their parameters belong (5183294)
mkdir -p .dev/sums/probes
git archive 5183294 shtx shtx_kernels benchmarks tests pyproject.toml | tar x -C .dev/sums
cp probes/sums.py .dev/sums/probes/
