# Unconditional CIFAR-10: FID of 50,000 images over network calls, as in the tables of DPM-Solver (arXiv 2206.00927),
# DEIS (2204.13902), UniPC (2302.04867) and Time-Shift (2305.15583).
#
# Model: google/ddpm-cifar10-32. The first three papers use the network of score SDE, which is not on the hub, so compare
# samplers with each other and not with the printed figures.
# Reference: the 50,000 training images.

. "$(dirname "$0")/common.sh"

if [ "${SMALL:-}" != 1 ]; then
    inception
    if [ ! -e "$DATA/cifar10.npz" ]; then
        fetch https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz "$DATA/cifar-10-binary.tar.gz"
        tar -xzf "$DATA/cifar-10-binary.tar.gz" -C "$DATA"
        $PREPARE cifar10 "$DATA"/cifar-10-batches-bin/data_batch_*.bin "$DATA/cifar10.npz"
    fi
    set -- --model google/ddpm-cifar10-32 --reference "$DATA/cifar10.npz" --number 50000 --batch-size 500 "$@"
fi
evaluate --samplers ddim,ts-ddim,dpm++,dpm++3m,deis-tab3,unipc-bh1,unipc3 --steps 5,6,8,10,12,15,20 \
    --output "${OUTPUT:-fid-cifar10}" "$@"
