"""The form of Gemini's state: fp32 copies and moments of what lies in this process's slice of each
chunk of parameters."""

from collections.abc import Iterator

import torch

from opt.colossal.pieces import Form, Piece
from opt.model.weights import TIED_HEAD, Weights


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

    def place(self, weights: Weights, spread) -> None:
        """[F10] [F11] Fill chunks and fp32 copies. Raises RuntimeError if any parameter was left
        without its weights."""
        missing = self.model.load_state_dict(weights, strict=False).missing_keys
        missing += [name for name in self.model.name2param if name not in weights]
        if missing:
            raise RuntimeError(f"weights did not load: missing {missing[:3]}")
        for piece in self.pieces():
            if piece.size:
                piece.weights.copy_(
                    weights[piece.name].flatten()[piece.start : piece.start + piece.size]
                )

    def whole_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and whole tensors in 16 bits, chunk by chunk. A collective."""
        for shard, _ in self.model.state_dict_shard(max_shard_size=1024):
            yield from ((name, tensor) for name, tensor in shard.items() if name != TIED_HEAD)
