"""Makes and measures the images of an evaluation, on as many processes as there are.

Image ``i`` of every cell has the seed ``SEED + i`` and comes out of the same lines as in ``fewstep generate``. The
images are shared out in chunks of neighbours, each of them always one call of the pipeline and one of the extractor, so
neither the number of processes nor an interruption changes a bit on CPUs where processes have equally many
threads. What a chunk leaves is a file of features; when a cell has all of them, the main process measures it and
removes them.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from tqdm import tqdm

from fewstep.metrics import FeatureExtractor, ImageMetrics, ReferenceStatistics

from ..generation.model import Model
from ..generation.pictures import save_image
from ..generation.run import call_pipeline
from .chunks import CellFeatures, ChunkFiles
from .folder import EvaluationFolder
from .references import ReferenceSource, check_reference, check_shapes
from .report import cell_row, reference_row
from .settings import GROUPS, EvaluatedCell, Evaluation
from .stopwatch import Stopwatch


class Evaluator:
    """One process of an evaluation.

    Args:
        evaluation: checked settings.
        model: the model they name.
        extractor: of the features.
        source: of the reference.
        folder: the output.
        state: of the processes.

    Raises:
        ValueError: a sampler refuses the settings, or the reference does not serve the metrics.
    """

    def __init__(
        self,
        evaluation: Evaluation,
        model: Model,
        extractor: FeatureExtractor,
        source: ReferenceSource,
        folder: EvaluationFolder,
        state: PartialState,
    ) -> None:
        self._evaluation, self._model, self._extractor = evaluation, model, extractor
        self._source, self._folder, self._state = source, folder, state
        self._cells = evaluation.cells(model)
        self._reference = self._known_reference()
        if self._reference is None:
            source.check_number(evaluation.metrics)
        else:
            self._metrics(self._reference)

    def run(self, stopwatch: Stopwatch | None = None) -> None:
        """Makes and measures what is missing.

        Args:
            stopwatch: tells where this process' time goes, from the first chunk to the last figure.

        Raises:
            ValueError: the pipeline refuses a setting, images and reference are not alike, or the processes do not
                share the output.
        """
        number, measured = self._evaluation.settings.number, self._evaluation.metrics
        missing = [(cell, self._missing(cell)) for cell in self._cells if not self._folder.measured(cell, measured)]
        begun = next((cell for cell, chunks in missing if chunks), None)
        if begun is not None:
            self._try(begun)
        self._state.wait_for_everyone()  # all have seen what is missing before anything is added
        metrics = self._begin() if missing and self._state.is_main_process else None
        self._state.wait_for_everyone()
        if missing and not self._folder.begun():
            raise ValueError(
                f"output {self._folder.path} is not shared by all processes; give a folder that every machine sees"
            )
        with (
            nullcontext() if stopwatch is None else stopwatch.watch(self._model, self._extractor),
            tqdm(
                total=number * len(missing),
                initial=number * len(missing) - sum(len(chunk) for _, chunks in missing for chunk in chunks),
                unit="image",
                file=sys.stderr,
                disable=not self._state.is_main_process,
            ) as bar,
        ):
            for done, (cell, chunks) in enumerate(missing):
                bar.set_description(cell.title)
                files = self._folder.chunks(cell)
                for indices in chunks[self._state.process_index :: self._state.num_processes]:
                    self._make(cell, indices, files)
                    if self._state.is_main_process:
                        begins = files.begins()  # of all processes
                        made = sum(len(chunk) for chunk in self._evaluation.chunks() if chunk.start in begins)
                        bar.update(max(number * done + made - bar.n, 0))
                self._state.wait_for_everyone()
                if metrics is not None:
                    self._measure(cell, files.read(list(self._evaluation.chunks())), metrics)
                    files.remove()
        if self._state.is_main_process:
            self._folder.finish(self._cells)

    def _missing(self, cell: EvaluatedCell) -> list[range]:
        begins = self._folder.chunks(cell).begins()
        return [indices for indices in self._evaluation.chunks() if indices.start not in begins]

    def _try(self, cell: EvaluatedCell) -> None:
        """Refuses what does not fit together by one image, before anything is written."""
        image = _pixels(self._pictures(cell, range(1)))
        self._extractor.features_and_logits(image)
        shape = (image.shape[1], image.shape[2], image.shape[3])
        if self._reference is not None:
            check_shapes(shape, self._reference, self._source.name)
        else:
            self._source.check_like(shape)

    def _known_reference(self) -> ReferenceStatistics | None:
        """The statistics of the reference, where its images need not be read first."""
        if self._folder.reference.exists():
            return ReferenceStatistics.load(self._folder.reference, extractor=self._extractor.fingerprint)
        return None if self._source.computed else self._source.statistics(self._extractor, self._evaluation.chunk)

    def _begin(self) -> ImageMetrics:
        """The reference's statistics, computed once for an output, and the first files."""
        reference = self._reference
        if reference is None:
            reference = self._source.statistics(self._extractor, self._evaluation.chunk)
            self._folder.begin()
            reference.save(self._folder.reference)
        self._folder.begin()
        self._folder.reference_row = reference_row(self._source.to_json(), reference, self._extractor)
        return self._metrics(reference)

    def _metrics(self, reference: ReferenceStatistics) -> ImageMetrics:
        check_reference(reference, self._evaluation.metrics, self._source.name)
        metrics = ImageMetrics(self._evaluation.metrics, reference, extractor=self._extractor)
        metrics.distributed_available_fn = lambda: False  # this process has the features of all
        return metrics

    def _make(self, cell: EvaluatedCell, indices: range, files: ChunkFiles) -> None:
        pictures = self._pictures(cell, indices)
        features, logits = self._extractor.features_and_logits(_pixels(pictures))
        if self._evaluation.save_images:  # before the features, which say that the chunk is done
            for index, picture in zip(indices, pictures, strict=True):
                save_image(picture, self._folder.image_path(cell, index))
        calls = len(cell.scheduler.timesteps)
        files.write(indices, features, logits, calls)

    def _pictures(self, cell: EvaluatedCell, indices: range) -> list[Image.Image]:
        return call_pipeline(cell.settings, self._model, cell.scheduler, cell.cell.steps, indices)

    def _measure(self, cell: EvaluatedCell, found: CellFeatures, metrics: ImageMetrics) -> None:
        metrics.reset()
        metrics.update(found.features, range(len(found.features)), logits=found.logits)
        turn = max(len(cell.settings.classes), len(cell.settings.prompts), 1)
        self._folder.add(cell, cell_row(cell, found.calls, metrics.estimates(GROUPS, turn=turn), metrics.remarks()))


def _pixels(pictures: list[Image.Image]) -> torch.Tensor:
    """Pictures as uint8 ``(B, C, H, W)``: what their files would hold."""
    array = np.stack([np.asarray(picture) for picture in pictures])
    return torch.from_numpy(array if array.ndim == 4 else array[..., None]).permute(0, 3, 1, 2)
