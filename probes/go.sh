# bash .dev/go.sh LIST SECONDS STAMP
export STAMP=$3 PYTHONUNBUFFERED=1
[ -d /tmp/site ] || python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .whl/*.whl || exit
export PYTHONPATH=$PWD:/tmp/site R=/tmp/r
mkdir -p $R /tmp/bcache
nvidia-smi --query-gpu=name,driver_version --format=csv | tail -4
python3 .dev/jobs.py .dev/$1.py $2
mkdir -p $OUT/r; cp -r $R/. $OUT/r 2>/dev/null
cd $OUT && tar cJf /tmp/all.tar.xz . && rm -rf ./* && mv /tmp/all.tar.xz . && ls -la
