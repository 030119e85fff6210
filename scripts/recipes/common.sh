# What the recipes share. To be read by them, not run.
#
#   DATA     where downloads and conversions go              (data)
#   OUTPUT   folder of the figures                           (fid-NAME of the recipe)
#   LAUNCH   what starts the processes                       (accelerate launch -m fewstep.scripts)
#   SMALL=1  the recipe in small: a bundled model and reference, few images and steps, no download
#
# It needs curl and tar beside an environment with fewstep in it (accelerate config once, for several GPUs or machines).
# Options behind a recipe's name overrule its own, also in small:  sh cifar10.sh --number 10000 --steps 5,10

set -eu

DATA=${DATA:-data}
LAUNCH=${LAUNCH:-accelerate launch -m fewstep.scripts}
PREPARE="${PYTHON:-python} -m fewstep.scripts.recipes.prepare"

if [ "${SMALL:-}" = 1 ]; then
    # Between what the recipe puts before these words and the user's own; it adds nothing else in small.
    set -- --model digits-small --features digits --number 40 --steps 2 "$@"
fi

# fetch URL FILE: downloads what is not there yet; the file appears whole or not at all
fetch() {
    if [ ! -e "$2" ]; then
        mkdir -p "$(dirname "$2")"
        curl --fail --location --retry 3 --output "$2.part" "$1"
        mv "$2.part" "$2"
    fi
}

# The network of the FID, converted once.
inception() {
    if [ ! -e "$DATA/inception.safetensors" ]; then
        fetch https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth \
            "$DATA/pt_inception.pth"
        $PREPARE inception "$DATA/pt_inception.pth" "$DATA/inception.safetensors"
    fi
}

# evaluate OPTIONS: calls fewstep fid; of options that come twice the last counts
evaluate() {
    if [ "${SMALL:-}" = 1 ]; then
        $LAUNCH fid "$@"
    else
        $LAUNCH fid --features inception --weights "$DATA/inception.safetensors" "$@"
    fi
}
