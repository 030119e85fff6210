# MS-COCO with Stable Diffusion 1.5: FID of 30,000 images over network calls at two guidance scales, a caption of the
# validation set of 2014 each, as in the tables of USF (arXiv 2312.07243: 17.66 at 5 calls, 14.95 at 10).
#
# Model: stable-diffusion-v1-5/stable-diffusion-v1-5, without its safety checker.
# Reference: the images of these captions, resized and cut to 512 x 512.

. "$(dirname "$0")/common.sh"

if [ "${SMALL:-}" != 1 ]; then
    inception
    if [ ! -e "$DATA/coco-30000" ]; then
        fetch http://images.cocodataset.org/zips/val2014.zip "$DATA/val2014.zip"
        fetch http://images.cocodataset.org/annotations/annotations_trainval2014.zip "$DATA/annotations.zip"
        "${PYTHON:-python}" -m zipfile -e "$DATA/val2014.zip" "$DATA"
        "${PYTHON:-python}" -m zipfile -e "$DATA/annotations.zip" "$DATA"
        $PREPARE coco "$DATA/annotations/captions_val2014.json" "$DATA/val2014" "$DATA/coco-30000"
    fi
    set -- --model stable-diffusion-v1-5/stable-diffusion-v1-5 --dtype float16 --prompts "$DATA/coco-30000/prompts.txt" \
        --reference "$DATA/coco-30000/images" --reference-size 512 --reference-channels 3 \
        --number 30000 --batch-size 16 "$@"
fi
evaluate --samplers ddim,dpm++,unipc,hb-unipc --steps 5,6,8,10,15,20 --guidance-scale 3,7.5 \
    --output "${OUTPUT:-fid-coco}" "$@"
