"""Sampling: one model plays hundreds of trials at once.

A trial (lamer.run_trial) is a coroutine that yields prompts and receives replies. Two samplers
serve a list of them and draw the same tokens:

    GenerateSampler     batched generation with `model.generate`, in lock-step over turns: the plain
                        reference, and the fallback for models with attention of another kind
    ContinuousSampler   continuous batching with prefix caching: every row of one preallocated
                        key/value cache goes on to its trial's next turn, and then to the next
                        trial, as soon as it can; what a prompt shares with the row's last one, or
                        with any other row's, is not computed again

A token is drawn by a uniform number keyed by (seed, step, trial, turn, token): what is sampled
depends neither on the sampler nor on the number of rows, of processes, nor on order. At the end of
the file stands what train.py and eval.py share: `make_sampler`, `rollout`, `summarize`.
"""

import bisect
import inspect
import math
import re
import sys
from collections import defaultdict, deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import Cache, CacheLayerMixin

from envs import EVAL_SEED, make_env
from lamer import (
    PastEpisode,
    Prompt,
    Reply,
    Trial,
    all_reduce_sum,
    common_prefix,
    count_tokens,
    cross_episode_returns,
    print0,
    run_trial,
)

# ------------------------------------------------------------------------- the chat format


class Chat:
    """Text to token ids and back, in the model's own chat format.

    The template is rendered once, around a marker; a prompt is then head + content + tail. The
    content is encoded with special tokens switched off, so `<|im_end|>` in a board, a reply or a
    reflection stays plain text.
    """

    def __init__(self, tokenizer: Any, stop_ids: Iterable[int] = ()):
        self.tokenizer = tokenizer
        marker, head, tail = "CONTENT", "", "\n"
        if tokenizer.chat_template:
            # Some templates print today's date: a run resumed tomorrow would differ.
            options = dict(enable_thinking=False, date_string="1 January 2026")
            message = [{"role": "user", "content": marker}]
            text = tokenizer.apply_chat_template(
                message, tokenize=False, add_generation_prompt=True, **options
            )
            head, _, tail = text.partition(marker)
        self.head = tokenizer.encode(head, add_special_tokens=False)
        self.tail = tokenizer.encode(tail, add_special_tokens=False)
        self.backend = getattr(tokenizer, "backend_tokenizer", None)  # half the time of its wrapper
        if self.backend:
            self.backend.no_truncation()
            self.backend.no_padding()
        # Markers not declared special, such as Qwen3's <think>, are split after their first
        # character to stay text. The tiny policy's pieces are added tokens on purpose.
        self.markers = None
        added = [token for token in tokenizer.added_tokens_decoder.values() if not token.special]
        texts = [token.content for token in added if len(token.content) > 1]
        self.is_tiny = tokenizer.init_kwargs.get("is_tiny", False)
        if texts and not self.is_tiny:
            cuts = [f"(?<={re.escape(text[0])})(?={re.escape(text[1:])})" for text in texts]
            self.markers = re.compile("|".join(cuts))
        self.stop_ids = {i for i in (*stop_ids, tokenizer.eos_token_id) if i is not None}
        if not self.stop_ids:
            raise ValueError("the tokenizer has no end-of-sequence token, so no reply would end")
        # Ids from here on exist in the model only as padding, and are never sampled.
        self.vocab_size = len(tokenizer)

    def encode(self, prompt: str) -> list[int]:
        """Token ids of one user message, up to and including the start of the answer."""
        return self.head + self.encode_plain(prompt) + self.tail

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of the text alone, with no special tokens whatever it holds."""
        if self.backend is None:
            return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        self.backend.encode_special_tokens = True
        pieces = self.markers.split(text) if self.markers else [text]
        ids = []
        for piece in pieces:
            ids += self.backend.encode(piece, add_special_tokens=False).ids
        return ids

    def decode(self, reply_ids: Sequence[int]) -> str:
        """The text of a reply, without its end token."""
        if reply_ids and reply_ids[-1] in self.stop_ids:
            reply_ids = reply_ids[:-1]
        return self.tokenizer.decode(
            reply_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )


# --------------------------------------------------------------------------- keyed draws


def uniforms(*key: int | np.ndarray) -> np.ndarray:
    """Uniform numbers in [0, 1) that depend on nothing but the key (splitmix64 over its parts)."""
    shape = np.broadcast_shapes(*(np.shape(part) for part in key)) or (1,)
    state = np.zeros(shape, dtype=np.uint64)
    for part in key:
        state = (state ^ np.asarray(part, dtype=np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


@dataclass
class Sampling:
    """How tokens are drawn. Training draws from the policy itself: top-p and top-k off."""

    seed: int = 0
    step: int = 0
    temperature: float = 1.0  # as in the loss; 0 takes the likeliest token
    top_p: float = 1.0
    top_k: int = 0  # 0 is off


def pick_tokens(logits: Tensor, uniform: np.ndarray, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the cumulative distribution at `uniform`.

    logits (B, V), uniform (B,) -> tokens (B,) and their log-probabilities (B,), under the
    distribution drawn from.
    """
    if sampling.temperature == 0:
        logps = logits.float().log_softmax(-1)  # (B, V)
        tokens = logps.argmax(-1)
        return tokens, logps.gather(-1, tokens[:, None])[:, 0]
    logits = logits.float() / sampling.temperature  # (B, V)
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < least, -math.inf)
    if sampling.top_p < 1:
        ordered, order = logits.softmax(-1).sort(-1, descending=True)
        drop = ordered.cumsum(-1) - ordered >= sampling.top_p  # the first token is always kept
        logits = logits.masked_fill(drop.scatter(-1, order, drop), -math.inf)
    logps = logits.log_softmax(-1)  # (B, V)
    cumulative = logps.double().exp().cumsum(-1)  # (B, V); its end is not exactly 1
    target = torch.as_tensor(uniform, device=logits.device)[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, target, right=True)[:, 0]
    tokens = tokens.clamp(max=logits.shape[-1] - 1)
    return tokens, logps.gather(-1, tokens[:, None])[:, 0]


# --------------------------------------------- the plain sampler: batched HF generation


def pad(rows: Sequence[Sequence[int]], left: bool = False) -> Tensor:
    """Pad to a rectangle with id 0. [[5, 6], [7]] -> [[5, 6], [7, 0]]

    Which ids are padding is told by length, never by id: 0 may be a token like any other.
    """
    width = max(len(row) for row in rows)
    padded = []
    for row in rows:
        fill = [0] * (width - len(row))
        padded.append([*fill, *row] if left else [*row, *fill])
    return torch.tensor(padded)


class GenerateSampler:
    """The plain reference: `model.generate`, trials in lock-step over turns."""

    def __init__(self, model: Any, chat: Chat, slots: int, max_reply: int):
        self.model, self.chat, self.slots, self.max_reply = model, chat, slots, max_reply

    @torch.no_grad()
    def run(
        self, trials: Sequence[Generator], trial_ids: Sequence[int], sampling: Sampling
    ) -> list[Trial]:
        """Play all trials to their end; `trial_ids` number them for the random draws."""
        finished: list[Trial | None] = [None] * len(trials)
        prompts = {i: next(trial).ids for i, trial in enumerate(trials)}
        turn = 0
        while prompts:
            live = list(prompts)
            for start in range(0, len(live), self.slots):
                batch = live[start : start + self.slots]
                draw = DrawTokens([trial_ids[i] for i in batch], turn, sampling, self.chat)
                replies = self.generate([prompts[i] for i in batch], draw)
                for i, reply in zip(batch, replies, strict=True):
                    try:
                        prompts[i] = trials[i].send(reply).ids
                    except StopIteration as stop:
                        finished[i] = stop.value
                        del prompts[i]
            turn += 1
        return finished

    def generate(self, prompts: Sequence[Sequence[int]], draw: "DrawTokens") -> Iterator[Reply]:
        """Reply to every prompt."""
        device = self.model.device
        tokens = pad(prompts, left=True).to(device)  # (B, L)
        is_content = pad([[1] * len(prompt) for prompt in prompts], left=True).to(device)  # (B, L)
        plain = GenerationConfig(
            do_sample=False,
            max_new_tokens=self.max_reply,
            eos_token_id=sorted(self.chat.stop_ids),
            pad_token_id=0,
        )
        # `generate` fills in what is left open from the model's own settings; a repetition penalty,
        # say, would make it another policy.
        own, self.model.generation_config = self.model.generation_config, GenerationConfig()
        self.model.generate(
            tokens,
            attention_mask=is_content,
            generation_config=plain,
            logits_processor=LogitsProcessorList([draw]),
        )
        self.model.generation_config = own
        sampled = torch.stack(draw.tokens, 1).tolist()  # (B, T)
        sampled_logps = torch.stack(draw.logps, 1).tolist()  # (B, T)
        for row, logps in zip(sampled, sampled_logps, strict=True):
            ends = [i + 1 for i, token in enumerate(row) if token in self.chat.stop_ids]
            end = ends[0] if ends else len(row)
            yield Reply(row[:end], logps[:end], self.chat.decode(row[:end]))


class DrawTokens(LogitsProcessor):
    """Makes greedy `generate` emit the tokens that `pick_tokens` draws, and keeps them."""

    def __init__(self, trial_ids: Sequence[int], turn: int, sampling: Sampling, chat: Chat):
        self.trial_ids, self.turn, self.sampling = np.array(trial_ids), turn, sampling
        self.vocab_size = chat.vocab_size
        self.tokens: list[Tensor] = []
        self.logps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        key = self.sampling.seed, self.sampling.step, self.trial_ids, self.turn, len(self.tokens)
        scores_known = scores[:, : self.vocab_size]
        tokens, logps = pick_tokens(scores_known, uniforms(*key), self.sampling)
        self.tokens.append(tokens)
        self.logps.append(logps)
        return torch.full_like(scores, -math.inf).scatter(-1, tokens[:, None], 0.0)


# --------------------------------------------- continuous batching with prefix caching


@dataclass
class CacheRow:
    """One row of the key/value cache, and the trial that uses it."""

    trial: Generator | None = None  # the coroutine
    trial_index: int = 0  # its place in the list of trials
    turn_index: int = 0  # its model calls so far
    cached_ids: list[int] = field(default_factory=list)  # tokens whose keys and values it holds
    pending_ids: list[int] = field(default_factory=list)  # of the prompt, still to be computed
    reply_ids: list[int] = field(default_factory=list)  # sampled so far
    logps: list[float] = field(default_factory=list)  # of the reply tokens


def start_trial(row: CacheRow, trial_index: int, trial: Generator) -> None:
    """Give the row to a trial and begin its first turn; what the row holds may serve again."""
    row.trial, row.trial_index, row.turn_index = trial, trial_index, 0
    start_reply(row, next(trial))


def start_reply(row: CacheRow, prompt: Prompt) -> None:
    """Keep what the row holds of this prompt; the rest is still to be computed."""
    # The last token is computed in any case: it gives the first logits.
    length = common_prefix(row.cached_ids, prompt.ids[:-1])
    row.cached_ids, row.pending_ids = prompt.ids[:length], prompt.ids[length:]
    row.reply_ids, row.logps = [], []


def finish_reply(row: CacheRow, chat: Chat) -> Trial | None:
    """Send the reply to the trial and begin the next one; returns the Trial if it has ended."""
    row.turn_index += 1
    try:
        prompt = row.trial.send(Reply(row.reply_ids, row.logps, chat.decode(row.reply_ids)))
    except StopIteration as stop:
        return stop.value
    start_reply(row, prompt)
    return None


@dataclass
class CacheView:
    """What a forward pass works on; shared by the layers of a cache."""

    rows: Tensor | None = None  # (B,)
    selected: Tensor | slice | None = None  # the same rows, as a slice where they are the first B
    positions: Tensor | None = None  # (B, T) of the new tokens
    width: int = 0  # columns that attention reads


class RowLayer(CacheLayerMixin):
    """One layer of the cache, preallocated; each row is written at positions of its own."""

    is_sliding = False

    def __init__(self, num_rows: int, capacity: int, view: CacheView):
        super().__init__()
        self.num_rows, self.capacity, self.view = num_rows, capacity, view

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        shape = self.num_rows, key_states.shape[1], self.capacity
        # zeros, not empty: a masked NaN is still NaN
        self.keys = key_states.new_zeros(*shape, key_states.shape[-1])  # (R, H, C, D)
        self.values = value_states.new_zeros(*shape, value_states.shape[-1])  # (R, H, C, D)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write (B, H, T, D) states at the view's positions; return what its rows hold so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        view = self.view
        where = view.rows[:, None], slice(None), view.positions
        self.keys[where] = key_states.transpose(1, 2)  # (B, T, H, D)
        self.values[where] = value_states.transpose(1, 2)
        keys = self.keys[view.selected, :, : view.width]  # (B, H, W, D)
        values = self.values[view.selected, :, : view.width]
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.view.width, 0

    def get_seq_length(self) -> int:
        return 0  # positions are given with every pass

    def get_max_length(self) -> int:
        return self.capacity


class RowCache(Cache):
    """The key/value cache of R rows and C columns, and the view of the present forward pass."""

    def __init__(self, num_layers: int, num_rows: int, capacity: int, device: torch.device):
        self.capacity, self.device = capacity + 1, device  # the last column is scratch
        self.view = CacheView()
        layers = [RowLayer(num_rows, self.capacity, self.view) for _ in range(num_layers)]
        super().__init__(layers=layers)

    def select(
        self, rows: Sequence[int], positions: np.ndarray, width: int, dtype: torch.dtype
    ) -> Tensor:
        """Set the view to rows and positions (B, T); returns the causal mask (B, 1, T, width)."""
        view = self.view
        view.rows = torch.tensor(rows, device=self.device)
        is_head = list(rows) == list(range(len(rows)))
        view.selected = slice(len(rows)) if is_head else view.rows
        # Padding may reach beyond the end: it lands in the scratch column.
        view.positions = torch.as_tensor(positions, device=self.device).clamp(max=self.capacity - 1)
        view.width = width
        hidden = torch.arange(width, device=self.device) > view.positions[:, :, None]  # (B, T, W)
        # Additive: a boolean mask is added, not applied, by eager attention.
        mask = torch.zeros(hidden.shape, dtype=dtype, device=self.device)
        return mask.masked_fill_(hidden, torch.finfo(dtype).min)[:, None]

    def copy(self, source: int, targets: Sequence[int], length: int) -> None:
        """Copy the first `length` columns of a row to other rows."""
        for layer in self.layers:
            for states in (layer.keys, layer.values):
                states[targets, :, :length] = states[source, :, :length]


LEAST_SHARED = 8  # tokens; for fewer, waiting and copying would cost more than computing them


def share_prefixes(
    cache: RowCache, rows: Sequence[CacheRow], new: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Copy what other rows hold of new prompts; returns the rows to compute now, and later.

    Later are those that begin as one that is computed now, and can then copy that from it: of the
    trials of a task only the first computes the rules, the board, and any move they all made.
    """
    held = sorted((row.cached_ids, number) for number, row in enumerate(rows))
    prompts = {number: rows[number].cached_ids + rows[number].pending_ids for number in new}
    copies, now, later, leader = defaultdict(list), [], [], []
    for number in sorted(new, key=prompts.__getitem__):
        row, prompt = rows[number], prompts[number]
        wanted = prompt[:-1]  # the last token is computed: it gives the first logits
        # In a sorted list those with the longest common prefix are next to where it would stand.
        place = bisect.bisect(held, (prompt,))
        near = held[max(0, place - 1) : place + 1]
        length, source = max((common_prefix(ids, wanted), other) for ids, other in near)
        if length - len(row.cached_ids) >= LEAST_SHARED:
            copies[source, length].append(number)
            row.cached_ids, row.pending_ids = prompt[:length], prompt[length:]
        if common_prefix(leader, wanted) - len(row.cached_ids) >= LEAST_SHARED:
            later.append(number)
        else:
            now.append(number)
            leader = prompt
    for (source, length), targets in copies.items():
        cache.copy(source, targets, length)
    return now, later


class UnsupportedModelError(ValueError):
    """Continuous batching cannot serve this model."""


PREFILL_TOKENS = 8192  # of new prompts computed at once, padding included
# Whose work takes the time that any pass takes beside it: tried on a CPU, a guess for GPUs.
PASS_TOKENS = {"cpu": 64, "cuda": 1024}


def prefill_batches(
    rows: Sequence[CacheRow], numbers: Iterable[int], pass_tokens: int
) -> list[list[int]]:
    """The rows with these numbers in batches of similar length.

    A batch ends where the next row would pad it by more than pass_tokens, or over PREFILL_TOKENS.
    """
    batches: list[list[int]] = []
    size, width, cost = 0, 0, 0
    for number in sorted(numbers, key=lambda number: len(rows[number].pending_ids)):
        new, cached = len(rows[number].pending_ids), len(rows[number].cached_ids)
        # Memory in tokens: cached ones are copied to be read, for a quarter of a new one's.
        cost = max(cost, new, cached // 4)
        if not batches or size * (new - width) > pass_tokens or (size + 1) * cost > PREFILL_TOKENS:
            batches.append([])
            size, cost = 0, max(new, cached // 4)
        batches[-1].append(number)
        size, width = size + 1, new
    return batches


class ContinuousSampler:
    """Plays many trials at once, each in a row of one preallocated key/value cache.

    Every pass of the loop gives each live row one token. A reply that ends goes straight to its
    trial; of the next prompt only what differs from the tokens the row holds is computed. When a
    trial ends, the next waiting one takes the row. So no trial waits for a slower one. The cache
    lives no longer than one `run`: weights change between runs, and the update needs its memory.
    """

    def __init__(
        self,
        model: Any,
        chat: Chat,
        slots: int,
        max_prompt: int,
        max_reply: int,
        probe_ids: Sequence[int],
    ):
        """`slots` is the number of rows; `probe_ids`, a real prompt, is what the check computes."""
        shape = model.config.get_text_config()
        window = getattr(shape, "sliding_window", None) or math.inf
        layers = set(getattr(shape, "layer_types", None) or ["full_attention"])
        if layers != {"full_attention"} or window < max_prompt + max_reply:
            raise UnsupportedModelError("this model has layers without full attention")
        if model.config._attn_implementation not in ("eager", "sdpa"):
            raise UnsupportedModelError("its attention takes no mask of ours (eager or sdpa does)")
        self.model, self.chat, self.slots, self.max_reply = model, chat, slots, max_reply
        self.num_layers, self.capacity = shape.num_hidden_layers, max_prompt + max_reply
        # transformers 5.24 renamed the argument; 5.40 will know the new name only
        parameters = inspect.signature(model.get_decoder().forward).parameters
        self.cache_argument = "cache" if "cache" in parameters else "past_key_values"
        self.check(list(probe_ids)[-self.capacity :])

    @torch.no_grad()
    def check(self, ids: list[int]) -> None:
        """Raise where the model does not take cache, mask or positions as given.

        Two rows take a prompt in two parts, the first not to its end, so that padding follows what
        it reads. Both must give the logits of a plain pass but for rounding: four of the dtype's
        last digits, or four times what other padding changes in a plain pass.
        """
        half, short = len(ids) // 2, len(ids) * 3 // 4
        rows = [CacheRow(), CacheRow()]
        cache = RowCache(self.num_layers, 2, self.capacity, self.model.device)
        try:
            self.forward(cache, rows, [0, 1], [ids[:half], ids[:half]])
            ours = self.forward(cache, rows, [0, 1], [ids[half:short], ids[half:]])  # (2, V)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # every architecture fails in a way of its own
            raise UnsupportedModelError(f"this model cannot use our cache ({error})") from error

        def plain(padding: int) -> Tensor:
            tokens = torch.tensor([ids + ids[:1] * padding], device=self.model.device)
            hidden = self.model.get_decoder()(tokens, use_cache=False).last_hidden_state
            logits = self.model.get_output_embeddings()(hidden[0, [short - 1, len(ids) - 1]])
            return logits[:, : ours.shape[1]].float()  # (2, V)

        logits = plain(padding=0)
        rounding = (plain(padding=13) - logits).norm(dim=1)
        digits = max(1e-3, 4 * torch.finfo(self.model.dtype).eps)  # fp32 sums have errors of 1e-6
        allowed = torch.maximum(4 * rounding, digits * logits.norm(dim=1))
        if not ((ours.float() - logits).norm(dim=1) <= allowed).all():
            raise UnsupportedModelError("this model reads a cache in a way of its own")

    @torch.no_grad()
    def run(
        self, trials: Sequence[Generator], trial_ids: Sequence[int], sampling: Sampling
    ) -> list[Trial]:
        """Play all trials to their end; `trial_ids` number them for the random draws."""
        assert not self.model.training, "sampling needs model.eval()"
        cache = RowCache(self.num_layers, self.slots, self.capacity, self.model.device)
        finished: list[Trial | None] = [None] * len(trials)
        waiting = deque(enumerate(trials))
        rows = [CacheRow() for _ in range(min(self.slots, len(trials)))]
        for row in rows:
            start_trial(row, *waiting.popleft())
        while rows:
            logits = self.next_logits(cache, rows)  # (R, V)
            key = [(trial_ids[row.trial_index], row.turn_index, len(row.reply_ids)) for row in rows]
            uniform = uniforms(sampling.seed, sampling.step, *np.array(key).T)
            tokens, logps = pick_tokens(logits, uniform, sampling)
            ended = []
            pairs = zip(rows, tokens.tolist(), logps.tolist(), strict=True)
            for number, (row, token, logp) in enumerate(pairs):
                row.reply_ids.append(token)
                row.logps.append(logp)
                is_over = token in self.chat.stop_ids or len(row.reply_ids) >= self.max_reply
                trial = finish_reply(row, self.chat) if is_over else None
                if trial is not None:
                    finished[row.trial_index] = trial
                    if waiting:
                        start_trial(row, *waiting.popleft())
                    else:
                        ended.append(number)
            # Live rows stay at the head of the cache, so that decoding reads it in place.
            for number in reversed(ended):
                last = rows.pop()
                if number < len(rows):
                    cache.copy(len(rows), [number], len(last.cached_ids))
                    rows[number] = last
        return finished

    def next_logits(self, cache: RowCache, rows: Sequence[CacheRow]) -> Tensor:
        """Logits (R, V) of every row's next token, after its prompt or its last reply token."""
        new = [number for number, row in enumerate(rows) if not row.reply_ids]
        logits = None
        if len(new) < len(rows):
            # All rows, so that the cache is read in place; those with a new prompt idle.
            last = [row.reply_ids[-1:] for row in rows]
            logits = self.forward(cache, rows, range(len(rows)), last)
        while new:
            now, new = share_prefixes(cache, rows, new)
            for batch in prefill_batches(rows, now, PASS_TOKENS[self.model.device.type]):
                ready = self.forward(cache, rows, batch, [rows[n].pending_ids for n in batch])
                if logits is None:
                    logits = ready.new_zeros(len(rows), ready.shape[-1])
                logits[batch] = ready
        return logits

    def forward(
        self,
        cache: RowCache,
        rows: Sequence[CacheRow],
        numbers: Sequence[int],
        new_ids: Sequence[Sequence[int]],
    ) -> Tensor:
        """Logits (B, V) after the new tokens of the rows with these numbers, which then hold them.

        The padding of a short row, and of a row without new tokens, is written behind what the row
        holds, where later tokens overwrite it before it is ever seen.
        """
        tokens = pad(new_ids).to(self.model.device)  # (B, T)
        starts = np.array([len(rows[number].cached_ids) for number in numbers])[:, None]  # (B, 1)
        positions = starts + np.arange(tokens.shape[1])  # (B, T)
        longest = 0
        for number, ids in zip(numbers, new_ids, strict=True):
            if ids:
                rows[number].cached_ids += ids
                longest = max(longest, len(rows[number].cached_ids))
        width = min(-(-longest // 32) * 32, cache.capacity)  # few widths keep the allocator calm
        mask = cache.select(numbers, positions, width, self.model.dtype)
        hidden = self.model.get_decoder()(
            input_ids=tokens,
            position_ids=cache.view.positions,
            attention_mask=mask,
            use_cache=True,
            **{self.cache_argument: cache},
        ).last_hidden_state  # (B, T, h)
        last = hidden[range(len(numbers)), [len(ids) - 1 for ids in new_ids]]  # (B, h)
        return self.model.get_output_embeddings()(last)[:, : self.chat.vocab_size]


# -------------------------------------------------------- what train.py and eval.py share


def make_sampler(
    config: Any, model: Any, chat: Chat, slots: int
) -> ContinuousSampler | GenerateSampler:
    """The sampler of --sampler for `slots` trials at once; prints which one runs.

    The plain one also where the model's attention is of another kind.
    """
    probe_ids = first_prompt(config, chat)
    sampler, note = None, "--sampler generate"
    if config.sampler == "continuous":
        try:
            limits = slots, config.max_prompt, config.max_reply
            sampler = ContinuousSampler(model, chat, *limits, probe_ids)
        except UnsupportedModelError as error:
            note = f"{error}: falling back to the plain sampler"
    kind = f"model.generate in lock-step ({note})" if sampler is None else "continuous batching"
    print0(f"sampler: {kind}, {slots} trials at once")
    return sampler or GenerateSampler(model, chat, slots, config.max_reply)


def first_prompt(config: Any, chat: Chat) -> list[int]:
    """A real prompt: what models are tried on. ValueError if it does not fit into --max_prompt."""
    env = make_env(config.env, **config.env_options)
    trial = run_trial(env, EVAL_SEED, 1, chat, style=config.style, max_prompt=10**9)
    ids = next(trial).ids
    if len(ids) > config.max_prompt:
        raise ValueError(
            f"one turn of {env.name} needs {len(ids)} prompt tokens, "
            f"--max_prompt is {config.max_prompt}"
        )
    return ids


def rollout(
    config: Any,
    sampler: ContinuousSampler | GenerateSampler,
    seeds: Sequence[int],
    trial_ids: Sequence[int],
    sampling: Sampling,
    borrowed: Sequence[Sequence[PastEpisode]] | None = None,
) -> list[Trial]:
    """Play one trial for each seed; `trial_ids` number them for the random draws.

    From `config`: env and env_options, episodes, memory, style, max_prompt. `borrowed` holds, for
    every trial, the memory of another one to be used in the place of its own. Where memory runs
    out, all begins anew with half the rows: draws are keyed, so the same trials come out.
    """
    while True:
        trials = []
        for i, seed in enumerate(seeds):
            trial = run_trial(
                make_env(config.env, **config.env_options),
                seed,
                config.episodes,
                sampler.chat,
                memory=config.memory,
                style=config.style,
                max_prompt=config.max_prompt,
                borrowed=None if borrowed is None else borrowed[i],
            )
            trials.append(trial)
        try:
            return sampler.run(trials, trial_ids, sampling)
        except torch.OutOfMemoryError:
            if sampler.slots == 1:
                raise
        sampler.slots = min(sampler.slots, len(trials)) // 2 or 1
        if config.device == "cuda":
            torch.cuda.empty_cache()
        print(f"out of memory: going on with --slots {sampler.slots}", file=sys.stderr)


def summarize(trials: Sequence[Trial], config: Any) -> dict[str, Any]:
    """Over the trials of all processes: success after 1..N episodes, return, validity, counts.

    From `config`: episodes, device, and for the return G_0(0) that the objective is about reward,
    credit, gamma_step and gamma_traj.
    """
    turns = [turn for trial in trials for turn in trial.turns]
    total_return = 0.0
    for trial in trials:
        rewards = trial.rewards(config.reward)
        discounts = config.credit, config.gamma_step, config.gamma_traj
        total_return += cross_episode_returns(rewards, *discounts)[0][0]
    sums = [len(trials), total_return, sum(turn.is_valid for turn in turns), len(turns)]
    sums += [count_tokens(turns), sum(trial.num_shortened for trial in trials)]
    sums += [sum(t.success_after(k + 1) for t in trials) for k in range(config.episodes)]
    num_trials, ret, num_valid, num_turns, num_tokens, num_shortened, *wins = all_reduce_sum(
        sums, config.device
    )
    return {
        "success": [won / num_trials for won in wins],
        "return": ret / num_trials,
        "valid": num_valid / num_turns,
        "turns": int(num_turns),
        "reply_tokens": int(num_tokens),
        "shortened": int(num_shortened),
    }
