"""The form of Gemini's state: fp32 copies and moments of what lies in this process's slice of each
chunk of parameters."""

from collections.abc import Iterator

import torch
from colossalai.utils import is_ddp_ignored

from opt.colossal.pieces import Form, Piece
from opt.model.weights import Weights


class Chunks(Form):
    """GeminiDDP and GeminiOptimizer; step() is theirs."""

    def pieces(self) -> Iterator[Piece]:
        """What lies in this process's slice of each parameter's chunk; it may be nothing."""
        for number, working in self.optimizer.id_to_real_params.items():
            chunk = self.model.chunk_manager.get_chunk(working)
            # -1 each where nothing of it is here
            offset, start, size = self.optimizer.get_offsets(number)
            key = self.optimizer.id_to_fake_params.get(number)
            weights = (
                chunk.paired_chunk.payload[offset : offset + size] if key is not None else None
            )
            group = None if chunk.keep_gathered else chunk.torch_pg
            yield Piece(
                self.model.param2name[working],
                working.shape,
                max(0, start),
                max(0, size),
                key,
                weights,
                group,
            )

    def held(self) -> Iterator[tuple[str, torch.Size, int, torch.Tensor]]:
        """See Form: all are slices of chunks."""
        for (number, working), piece in zip(
            self.optimizer.id_to_real_params.items(), self.pieces(), strict=True
        ):
            if piece.size and piece.weights is not None:
                yield piece.name, piece.shape, piece.start, piece.weights
                chunk, (offset, _, size) = (
                    self.model.chunk_manager.get_chunk(working),
                    self.optimizer.get_offsets(number),
                )
                # As long as it lies where its fp32 copy does
                if chunk.payload.shape == chunk.paired_chunk.payload.shape:
                    part = chunk.payload[offset : offset + size]
                    yield piece.name, piece.shape, piece.start, part
        for parameter, start, part in self._frozen():
            yield self.model.param2name[parameter], parameter.shape, start, part

    def finish(self) -> None:
        """See Form: updates in host memory are made when forward asks for them."""
        if self.optimizer.optim.host_adam:
            self.optimizer.optim.host_adam.finish()

    def place(self, weights: Weights, spread) -> None:
        """[F10] [F11] Fill fp32 copies and, from these, chunks. Raises RuntimeError if any
        parameter was left without its weights."""
        missing = [name for name in self.model.name2param if name not in weights]
        if missing:
            raise RuntimeError(f"weights did not load: missing {missing[:3]}")
        self.finish()
        for name, parameter in self.model.unwrap().named_parameters():
            if is_ddp_ignored(parameter):
                parameter.data.copy_(weights[name])
        self._place_frozen(weights)
        for piece in self.pieces():
            if piece.size:
                part = weights[piece.name].flatten()[piece.start : piece.start + piece.size]
                # Narrowed where it is: PyTorch would copy it to the host as it is first
                piece.weights.copy_(part.to(piece.weights.dtype))
        for chunk in self.optimizer.chunk16_set:
            chunk.optim_update()
        self.finish()

    def _place_frozen(self, weights: Weights) -> None:
        for parameter, start, part in self._frozen():
            whole = weights[self.model.param2name[parameter]].flatten()
            part.copy_(whole[start : start + len(part)])

    def _frozen(self) -> Iterator[tuple[torch.Tensor, int, torch.Tensor]]:
        """This process's slices of chunks that only frozen parameters are in: a parameter, where
        the slice begins in it, and the slice."""
        manager = self.model.chunk_manager
        for parameter in getattr(self.model, "frozen_params", []):
            chunk = manager.get_chunk(parameter)
            info, first = chunk.tensors_info[parameter], chunk.shard_begin
            start, end = max(info.offset, first), min(info.end, chunk.shard_end)
            if start < end:
                part = chunk.payload[start - first : end - first]
                yield parameter, start - info.offset, part

    def whole_weights(self, only_trained=False) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and whole tensors in 16 bits, chunk by chunk. A collective."""
        self.finish()
        model, gathered = self.model, {}
        # Gradients take the place of those weights that have copies
        reused = model.chunk_manager.reuse_fp16_chunk
        copies = dict(zip(model.fp16_params, model.fp32_params, strict=True)) if reused else {}
        for name, parameter in model.unwrap().named_parameters():
            if only_trained and not parameter.requires_grad:
                continue
            if is_ddp_ignored(parameter):
                yield name, parameter.data
                continue
            held = copies.get(parameter, parameter)
            if held not in gathered:
                chunk = model.chunk_manager.get_chunk(held)
                gathered |= model._get_chunk_to_save_data(chunk, only_rank_0=True)
            yield name, gathered.pop(held)
