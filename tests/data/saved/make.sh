#!/usr/bin/env bash
# Makes saved.tar.xz, expected.npz and expected.json with the code that is to be recorded (PYTHON names the interpreter;
# without it, python): bash tests/data/saved/make.sh
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../../.." && pwd)
made=/tmp/saved  # which the files name
mkdir "$made"
trap 'rm -rf "$made"' EXIT
cd "$made"
run() { PYTHONPATH=$root ${PYTHON:-python} -m "$@"; }
export XLA_FLAGS="--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true" JAX_PLATFORMS=cpu

# Sets: Toy Band, and a folder of media with one clip that can be read and one that cannot.
run av_mae.prepare --dataset=toy_band --output=toy_band --clips=3 --test_clips=2 --workers=1
mkdir -p media/{bell,horn}
mv toy_band/clips/test/toy_band_single_test_000000.mp4 media/bell/one.mp4
head -c 1000 toy_band/clips/test/toy_band_single_test_000001.mp4 > media/horn/two.mp4
rm -r toy_band/clips
run av_mae.prepare --dataset=toy_band --variant=scene --output=scene --clips=1 --test_clips=1 --workers=1
rm -r scene/clips
run av_mae.prepare --dataset=folder --source=media --output=folder --frames=2 --size=32 --workers=1

# A pretraining of 4 steps, and its evaluation.
options=()
for stream in image audio; do
    for value in width=8 depth=1 heads=2 patch=8 mask_ratio=0.5; do options+=("--config.model.$stream.$value"); done
done
for value in image.size=16,16 audio.size=16,32 fusion.tokens=2,1,1 fusion.heads=2 decoder.width=8 decoder.depth=1 \
        decoder.heads=2; do
    options+=("--config.model.$value")
done
run av_mae.train --config="$root/configs/demo.py" --workdir=pretraining --config.data.path=toy_band \
    --config.data.weights=1.0, --config.data.sound.mels=16 --config.steps=4 --config.batch_size=3 \
    --config.checkpoint_every=4 --config.log_every=1 --config.images_every=0 --config.optimizer.warmup=1 \
    "${options[@]}"
run av_mae.evaluate --config="$root/configs/reconstruction.py" --workdir=reconstruction --config.init=pretraining \
    --config.data.path=toy_band

# A head: classification, 4 steps.
run av_mae.evaluate --config="$root/configs/classification.py:demo" --workdir=classification \
    --config.init=pretraining --config.data.path=toy_band --config.steps=4 --config.batch_size=3 \
    --config.checkpoint_every=4 --config.log_every=1 --config.bootstrap=100 --config.test_batch_size=2 \
    --config.pictures=0 --config.optimizer.warmup=1

# Embeddings, two files.
run av_mae.export --checkpoint=pretraining --data=toy_band:train --output=embeddings --shard_clips=2 --batch_size=2 \
    --workers=0

# Pictures and event files are not kept.
rm -rf media
find . \( -name 'events.*' -o -name '*.png' -o -name '*.wav' \) -delete
find . -type d -empty -delete

# One archive: the shards are mostly padding.
tar --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner -cJf "$here/saved.tar.xz" -- *
PYTHONPATH=$root:$root/tests ${PYTHON:-python} "$here/make_expected.py" "$made" "$here"
