# Class-conditional ImageNet, 256 x 256, guided: FID of 10,000 images over network calls, as in the table of heavy ball
# momentum (arXiv 2307.11118: DDIM 15.02, DPM-Solver++ 6.13 at 10 steps, GHVB 5.80), with inception score, precision and
# recall.
#
# Model: facebook/DiT-XL-2-256; its safetensors lie in the revision refs/pr/1.
# Reference: the 10,000 real images of guided-diffusion's reference batch. Published figures are against the statistics
# of all 1.28 million, so they are lower by what 10,000 images cost.

. "$(dirname "$0")/common.sh"

if [ "${SMALL:-}" != 1 ]; then
    inception
    fetch https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/VIRTUAL_imagenet256_labeled.npz \
        "$DATA/VIRTUAL_imagenet256_labeled.npz"
    if [ ! -e "$DATA/DiT-XL-2-256" ]; then
        hf download facebook/DiT-XL-2-256 --revision refs/pr/1 --exclude "*.bin" --local-dir "$DATA/DiT-XL-2-256.part"
        mv "$DATA/DiT-XL-2-256.part" "$DATA/DiT-XL-2-256"
    fi
    set -- --model "$DATA/DiT-XL-2-256" --dtype float16 --number 10000 --batch-size 64 \
        --reference "$DATA/VIRTUAL_imagenet256_labeled.npz" --reference-part arr_0 "$@"
    set -- --metrics fid,is,precision,recall "$@"
fi
evaluate --samplers ddim,dpm++,unipc,ipndm,ghvb3.5,hb-dpm++ --steps 6,7,8,9,10,15,20,25 --guidance-scale 1.5 \
    --output "${OUTPUT:-fid-imagenet}" "$@"
