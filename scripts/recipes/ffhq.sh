# Unconditional FFHQ, 256 x 256: FID of 50,000 images over network calls, as in the table of DC-Solver (arXiv 2409.03755;
# UniPC 18.66 at 5 calls, DC-Solver 10.38).
#
# Model: asparius/ldm-ffhq-256, the latent diffusion model of arXiv 2112.10752 as a pipeline of diffusers.
# Reference: the 70,000 images, which their licence wants you to fetch yourself (github.com/NVlabs/ffhq-dataset); say
# where they are by FFHQ=FOLDER. They are resized to 256 x 256.
# For DC-Solver: fewstep tune --method dc, and its folder among the samplers:  sh ffhq.sh --samplers unipc,tuned --steps 5

. "$(dirname "$0")/common.sh"

if [ "${SMALL:-}" != 1 ]; then
    inception
    set -- --model asparius/ldm-ffhq-256 --reference "${FFHQ:?give the folder of the FFHQ images as FFHQ=FOLDER}" \
        --reference-size 256 --reference-channels 3 --number 50000 --batch-size 100 "$@"
fi
evaluate --samplers ddim,dpm++,deis-tab3,unipc --steps 5,6,7,8,9,10 --output "${OUTPUT:-fid-ffhq}" "$@"
