"""The cache that a user hands to ``model.generate(past_key_values=…)``."""

import sys
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import Cache as TransformersCache
from transformers import PreTrainedModel

from .attention.interface import NAME, Mask, Pending
from .attention.reference import Variant
from .attention.rotary import Rotary
from .budgets import UNBOUNDED, Budget, Cascade, check_budget
from .errors import CacheMismatch, PromptTooLong, RecipeError, Unsupported
from .layers import Fresh, LayerGroup, Step, hand_over_inputs, new_group
from .memory import Arena, Parked, by_pool, sent
from .methods import Method
from .plan import Plan, Planner
from .prefill import Carried, Reader, read_in_blocks
from .recipe import Recipe
from .rematerialization import inputs_of
from .report import Report
from .scoring import PromptView
from .spec import LayerSpec, ModelSpec
from .tokens import hand_over_tokens


class Cache(TransformersCache, Reader):
    """A KV cache that keeps what a recipe keeps, in the formats it chooses, within a budget.

    ``model``: a transformers decoder; its attention implementation is set to "kvarn" (other caches keep working).
    ``recipe``: as in ``Recipe.parse``. ``budget``: a float is a share of the bytes that a dense cache of the same
    tokens would take, a string ("64MiB") bytes for the whole batch, an int entries a head; None: the recipe's own
    default. ``page_size``: entries in a page. ``arena``: pools to share with other caches, their page size and their
    ceiling in bytes with them; None: pools of its own, without a ceiling. ``block``: tokens of a prompt that are read,
    and compressed, at once, so that what is held is never more than the budget and one layer of a block; a pass then
    gives logits for its last block. None: as the recipe says. ``text``: token ids (int64 [n]) of a text that scores
    prompts, for recipes that want one (``epicache``); None: the last tokens of what was read.

    Prompts (passes of several tokens) are attended to exactly and compressed layer by layer; passes of one token are
    decoding steps. Nothing here carries gradients. Raises RecipeError, BudgetError or Unsupported here or, where the
    lengths decide, at the first layer of a pass, before anything has changed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        recipe: str | Method | Recipe = "full",
        budget: Budget = None,
        *,
        page_size: int = 16,
        arena: Arena | None = None,
        block: int | None = None,
        text: Tensor | None = None,
    ):
        super().__init__(layers=[])
        self.recipe = Recipe.parse(recipe).calibrated(model)
        check_budget(budget)
        page_size = page_size if arena is None else arena.page_size
        self.budget, self.page_size, self._shared_arena = budget, page_size, arena
        self.spec = self.recipe.told_apart(ModelSpec.from_config(model.config, model.dtype))
        _refuse_idle(self.recipe, self.spec)
        layouts = [self.recipe.layout(layer, self.spec.dtype, page_size) for layer in set(self.spec.layers)]
        self._rotary = Rotary(model) if any(layout.before_rope for layout in layouts) else None
        self._propagation = self.recipe.propagation
        self._later_layers = self._propagation.later_layers(model, self.spec) if self._propagation else []
        self.block = self.recipe.block if block is None else block
        self.tail, self.text = self.recipe.tail, text
        _check_reading(self.recipe, self.block, text)
        if self.block is not None or self.tail is not None:
            read_in_blocks(model)
        self._layer_inputs = inputs_of(model, self.spec) if self.recipe.rematerializes else []
        self._exemption = self.recipe.exemption
        if self._exemption and self._exemption.reads_inputs:
            hand_over_inputs(model, self.spec)
        self._sentence_ends = self.recipe.sentence_ends(self.spec)
        if self._sentence_ends is not None:
            hand_over_tokens(model)
        _use_kvarn(model)
        self._config = model.config.get_text_config(decoder=True)
        self.plan: Plan | None = None
        self._arena: Arena | None
        self._step: Step | None  # of the pass that is under way
        self._opened: Step | None  # a decoding step that was opened by hand, until the model has passed
        self._closing: Step | None  # from then on, until it has settled
        self._parked: list[list[Parked]] | None  # what is in the host's memory, of each group
        self._seen: Tensor  # int64 [B] on the host: real tokens of each sequence
        self._passed: Tensor  # the same with padding
        self._expected: Tensor  # int64 [] or [B] on the host: real tokens at the end of the prompt that was announced
        self._input: Tensor | None  # of the layer that comes next
        self._ids: Tensor | None  # tokens of the pass that comes next, where the recipe asks for them
        self._forget()

    # -- what transformers calls --------------------------------------------------------------------------------

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Pending, Pending]:
        """Takes the new keys and values of a layer ([B, K, q, D]) and returns handles for the attention function."""
        if self._config._attn_implementation != NAME:
            raise CacheMismatch(
                f"the model's attention implementation is {self._config._attn_implementation!r}; a kvarn cache needs "
                f"model.set_attn_implementation({NAME!r})"
            )
        self._check_shapes(key_states, value_states, layer_idx)
        return Pending(key_states, self, layer_idx), Pending(value_states, self, layer_idx)

    def take_inputs(self, inputs: Tensor) -> None:
        """The inputs [B, q, size] of the attention that comes next, where the recipe keeps inputs."""
        if self._layer_inputs:
            self._input = inputs

    def take_layer_inputs(self, inputs: Tensor) -> None:
        """What enters the whole layer that comes next, [B, q, size], where that decides which tokens stay exact."""
        if self._exemption and self._exemption.reads_inputs:
            self._input = inputs

    def take_tokens(self, tokens: Tensor | None) -> None:
        """The ids [B, q] of the pass that comes next (None: the model was given embeddings), where the recipe asks for
        them."""
        if self._sentence_ends is not None:
            self._ids = tokens

    @torch.no_grad()
    def attend(
        self, module: nn.Module, layer: int, query: Tensor, keys: Tensor, values: Tensor, mask: Mask, variant: Variant
    ) -> Tensor:
        """Attention of one layer's queries ([B, H, q, D]) over the cache and the new tokens; stores the new tokens."""
        if module.config is not self._config:
            raise CacheMismatch("this cache was made for another model: make one for each model")
        if layer == 0:
            self._begin(keys, mask)
        if self._step is None or layer != self._next_layer:
            raise CacheMismatch(
                f"layer {layer} came where layer {self._next_layer} was expected: the last pass was interrupted, or "
                "layers were skipped; call reset() and give the tokens again"
            )
        group, step = self._group_of[layer], self._step
        fresh = Fresh(query, keys, values, step, variant, self._input)
        self._input = None
        out = group.token(layer, fresh) if self._decoding else group.prompt(layer, fresh)
        self._next_layer += 1
        if self._next_layer == len(self.spec.layers):
            self._end()
        elif self._propagation and layer == self._last_whole_layer and not bool(step.before.any()):
            self._carry(group.chosen(layer, fresh, self._propagation))
        return out

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The logical length: tokens that have passed, padding included, whatever was evicted; of the longest sequence
        where they differ."""
        return self._logical

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._logical + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    @property
    def is_sliding(self) -> list[bool]:
        return [layer.window is not None for layer in self.spec.layers]

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return bool(self._groups)

    @property
    def batch_size(self) -> int:
        return self._seen.numel() if self._groups else -1

    @property
    def seen(self) -> Tensor:
        """Tokens of each sequence that have passed, without padding: int64 [B] on the host."""
        return self._seen

    def __len__(self) -> int:
        return len(self.spec.layers)

    def __repr__(self) -> str:
        return f"kvarn.Cache({str(self.recipe)!r}, budget={self.budget!r}, tokens={self._logical})"

    def reset(self) -> None:
        """Frees everything; the cache can be used again from the start."""
        for group in self._groups:
            group.store.free(group.everyone)
        self._carry_all()
        self._forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: sequence i becomes what sequence ``beam_idx[i]`` was. Pages are shared until written."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sequence ``repeats`` times, by reference."""
        self.batch_select_indices(torch.arange(max(self.batch_size, 0)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps (or repeats) sequences ``indices`` of the batch, by reference."""
        if not self._groups:
            return
        chosen = indices.to("cpu", torch.int64)
        groups = [group.selected(chosen) for group in self._groups]
        for group in self._groups:
            group.store.free(group.everyone)
        self._adopt(groups)
        self._seen, self._passed = self._seen[chosen], self._passed[chosen]
        self.plan = self.plan and self.plan.selected(chosen.tolist())

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Refused: what was evicted or encoded cannot be put back."""
        raise Unsupported(
            "a kvarn cache cannot be cropped (assisted or speculative generation): what a recipe dropped cannot be put "
            "back; fork() the cache before the tokens that may have to go"
        )

    # -- what kvarn adds ----------------------------------------------------------------------------------------

    def empty(self) -> "Cache":
        """A cache like this one, in the same arena where that was given, that holds nothing."""
        twin = self._twin()
        twin._forget()
        return twin

    def fork(self, bounded: bool = True) -> "Cache":
        """A second cache with the same contents by reference: whoever writes first copies the page it writes.

        ``bounded=False``: the budget binds the fork no longer; it keeps all that comes to it beside what is there. Both
        draw on the same pools, so the peak that either reports is the peak of both together."""
        twin = self._twin()
        twin._adopt([group.selected(torch.arange(group.batch)) for group in self._groups])
        twin._seen = self._seen.clone()
        if not bounded and twin._groups:
            twin._bounded = False
            twin.plan = twin._resolve(twin._seen)
            for group in twin._groups:
                group.allow(twin.plan)
        return twin

    def open(self) -> None:
        """Makes room for the next decoding step before the model computes it; ``settle`` then ends it.

        Without this a decoding step does both itself. Raises OutOfMemory before anything has changed."""
        if not self._groups or self._opened or self._closing or self._step or self._parked:
            raise CacheMismatch("a step can be opened in a cache that holds something, between two passes")
        device = self._groups[0].arena.device
        step = _step(self._seen, 1, None, device)
        self._begin_token(step)
        self._opened = step

    @property
    def opened(self) -> Step | None:
        """The step that ``open`` has made room for and that the model has not computed yet."""
        return self._opened

    def retract(self) -> None:
        """Takes back what ``open`` did, as long as the model has not begun; sequences may join again."""
        if self._step:
            raise CacheMismatch("the model has begun the step: it cannot be taken back")
        if self._opened:
            for group in self._groups:
                group.retract_token()
            self._opened = None

    def passed(self) -> None:
        """Says that the step that ``open`` began was computed without this cache being called, by a captured graph."""
        if not self._opened or self._step:
            raise CacheMismatch("only a step that was opened and not begun can have been computed elsewhere")
        self._step, self._decoding, self._tokens = self._opened, True, 1
        self._end()

    def settle(self) -> None:
        """Encodes what is ripe and evicts what is over the capacity after a step that ``open`` began.

        Raises OutOfMemory where that needs pages that the arena does not have; it can be called again when sequences
        have left."""
        if self._closing:
            for group in self._groups:
                group.end_token(self._closing)
            self._closing = None

    def to_host(self) -> None:
        """Moves all entries to the host's memory and gives the pages back, until ``to_device``."""
        if self._parked is None:
            self._parked = [group.store.park() for group in self._groups]

    def to_device(self) -> None:
        """Puts back, bit by bit, what ``to_host`` moved. Raises OutOfMemory before anything has changed."""
        if self._parked is None:
            return
        assert self._arena is not None
        stores = [(group.store, parked) for group, parked in zip(self._groups, self._parked, strict=True)]
        self._arena.require(by_pool([n for store, parked in stores for n in store.pages_to_unpark(parked)]))
        for store, parked in stores:
            store.unpark(parked)
        self._parked = None

    @property
    def parked_bytes(self) -> int:
        """Bytes of the pages that ``to_device`` would take of the device."""
        stores = zip((group.store for group in self._groups), self._parked or [], strict=False)
        needed = by_pool([n for store, parked in stores for n in store.pages_to_unpark(parked)])
        return sum(count * pool.page_bytes for pool, count in needed.items() if pool.tier == "device")

    def expect(self, tokens: int | Tensor) -> None:
        """The passes up to ``tokens`` tokens a sequence (int64 [B] on the host where they differ) are chunks of one
        prompt, planned from the first on by its end.

        Without it each chunk is planned as a prompt that ends there, and one of a single token is a decoding step.
        Prompts that the cache itself reads in blocks need no such word."""
        self._expected = torch.as_tensor(tokens)

    @property
    def expecting(self) -> bool:
        """Whether more of a prompt that was announced will come."""
        return bool((self._before(1) < self._expected).any())

    def require_room(self, tokens: int) -> None:
        """Raises PromptTooLong where the model has no positions for so many tokens more."""
        limit = self.spec.max_positions
        if limit is not None and self._logical + tokens > limit and not self.recipe.extends(self.spec):
            raise PromptTooLong(
                f"{self._logical + tokens} tokens, and the model has positions for {limit}: shorten the prompt"
            )

    def overflows(self, counts: Tensor) -> bool:
        """Whether entries have to leave when so many tokens come (int64 [B], host)."""
        evictions = (self.recipe.eviction(layer, self.spec.dtype) for layer in self.spec.layers)
        eviction = next((e for e in evictions if e), None)
        if eviction is None:
            return False
        capacity = self._resolve(self._before(len(counts)) + counts).capacity
        held = torch.zeros_like(capacity)
        for group in self._groups:
            held[group.numbers] = group.entries()
        return not eviction.fits(held + counts[:, None], capacity)

    def join(self, other: "Cache") -> None:
        """Appends the sequences of ``other``, a cache of the same model, recipe and arena, which is empty afterwards.

        Page tables move, no entry is copied. Sequences may have different lengths: give the passes that follow the
        ``position_ids`` of each. Raises CacheMismatch, before anything has changed."""
        self._check_joins(other)
        if not self._groups:
            self._arena, self.plan = other._arena, other.plan
            self._adopt(other._groups)
        else:
            for mine, theirs in zip(self._groups, other._groups, strict=True):
                mine.join(theirs)
            self.plan = self.plan.joined(other.plan) if self.plan and other.plan else None
        self._seen = torch.cat([self._seen, other._seen])
        self._passed = torch.cat([self._passed, other._passed])
        other._forget()

    def reserve(self, sequences: int) -> None:
        """Makes room in the tables for so many sequences, so that joining moves nothing; a cache that holds something,
        between two passes."""
        for group in self._groups:
            group.reserve(sequences)

    @property
    def groups(self) -> list[LayerGroup]:
        """The layers, those that are alike together."""
        return self._groups

    def leave(self, sequence: int) -> "Cache":
        """Takes ``sequence`` out of the batch, by reference, and returns it as a cache of its own; the last sequence
        takes its place. Raises CacheMismatch."""
        if not 0 <= sequence < self._seen.numel() or self._step or self._parked:
            raise CacheMismatch(
                f"sequence {sequence} of {self._seen.numel()} cannot leave: name one of the batch, between two passes"
            )
        alone = self._twin()
        alone._adopt([group.leave(sequence) for group in self._groups])
        others = list(range(self._seen.numel() - 1))
        if sequence < len(others):
            others[sequence] = len(others)
        for cache, chosen in ((alone, [sequence]), (self, others)):
            cache._seen, cache._passed = cache._seen[chosen], cache._passed[chosen]
            cache.plan = cache.plan and cache.plan.selected(chosen)
            cache._closing = cache._closing and cache._closing.selected(chosen)
            if cache._opened:
                cache._opened = cache._opened.selected(chosen)
                for group in cache._groups:
                    group.replace_token(cache._opened)
        return alone

    def free(self) -> None:
        """Gives all pages back. The cache is empty afterwards."""
        self.reset()

    def report(self) -> Report:
        """What the cache holds now, against a dense cache of the same tokens."""
        return Report.of(self._groups, self._arena, self.spec, self._seen.tolist(), str(self.recipe))

    def __del__(self) -> None:
        # A fork shares its pools with others, which must see its pages again.
        if sys.is_finalizing():
            return
        for group in getattr(self, "_groups", []):
            group.store.free(group.everyone)

    # -- inside -------------------------------------------------------------------------------------------------

    def _twin(self) -> "Cache":
        twin = object.__new__(Cache)
        twin.__dict__.update(self.__dict__)
        return twin

    def _forget(self) -> None:
        self._arena = self._shared_arena
        self._adopt([])
        self._seen = torch.zeros(0, dtype=torch.int64)
        self._passed = torch.zeros(0, dtype=torch.int64)
        self._step = self._opened = self._closing = self._parked = None
        self._carried: Carried | None = None
        self.following = None
        self._bounded = True  # whether the budget binds
        self._input = None
        self._ids = None
        self._decoding = False
        self._next_layer = 0
        self._expected = torch.tensor(0)

    def _adopt(self, groups: list[LayerGroup]) -> None:
        self._groups = groups
        self._group_of = {number: group for group in groups for number in group.numbers}

    def _begin(self, keys: Tensor, mask: Mask) -> None:
        """Before the first layer: the plan, the room, and every error that can be foreseen."""
        if self._step is not None:
            raise CacheMismatch("the last pass was interrupted before its last layer; call reset() and start again")
        following = self.following
        batch, tokens = keys.shape[0], keys.shape[2] - (0 if following is None else following.shape[1])
        if self._groups and batch != self.batch_size:
            raise CacheMismatch(f"the cache holds {self.batch_size} sequences, and a batch of {batch} came")
        if tokens > 1:
            self.require_room(tokens)
        if self._closing is not None:
            raise CacheMismatch("the last step was opened by hand: call settle() before the next pass")
        before = self._before(batch)
        step = self._with_ends(self._opened or _step(before, tokens, mask.valid, keys.device, following))
        decoding = bool(self._groups) and tokens == 1 and not step.padded and not self.expecting
        if self._opened and not decoding:
            raise CacheMismatch("room was made for a decoding step, and another pass came")
        plan = self.plan if decoding else self._resolve(step.after)
        if not self._groups:
            self._adopt(self._new_groups(batch, keys.device))
        if decoding:
            if not self._opened:
                self._begin_token(step)
        elif plan is not None:
            plan = self._with_peak(plan, step, keys.shape[2])
            for group in self._groups:
                group.allow(plan)
            self._cascade(plan, step)
        self.plan, self._step, self._decoding, self._next_layer = plan, step, decoding, 0
        self._tokens = tokens

    def _begin_token(self, step: Step) -> None:
        """Makes room for a token in all groups, or raises OutOfMemory before anything has changed."""
        assert self._arena is not None
        self._arena.require(by_pool([needed for group in self._groups for needed in group.pages_to_open()]))
        for group in self._groups:
            group.begin_token(step)

    def _with_ends(self, step: Step) -> Step:
        """``step`` with the tokens that end a sentence, where the recipe asks for it."""
        if self._sentence_ends is None:
            return step
        ids, self._ids = self._ids, None
        if ids is None:
            raise Unsupported(f"{self.recipe} needs token ids, and the model was given embeddings: give it input_ids")
        real = step.positions >= 0
        ids = ids[:, : real.shape[1]]
        return replace(step, ends=torch.isin(ids.to(real.device), self._sentence_ends.to(real.device)) & real)

    def _cascade(self, plan: Plan, step: Step) -> None:
        """Where layers share the budget by what they show: has them tell, and divides it anew after each of them."""
        policy = self.recipe.policy
        if not isinstance(policy, Cascade) or not policy.divides(plan.capacity, step.after):
            return
        # Layers are cut before they are encoded, and what they leave in open pages is not known exactly.
        planner = self._planner(step.after, empty=False)
        preferences = torch.zeros(plan.capacity.shape[:2], dtype=torch.float64)

        def divide(number: int, view: PromptView) -> None:
            preferences[number] = policy.preference(view).cpu()
            self.plan = replace(planner.divided(policy.preferring(preferences)), peak=plan.peak)
            for group in self._groups:
                group.shrink(self.plan, number, step.after)

        for group in self._groups:
            group.share(divide)

    def _before(self, batch: int) -> Tensor:
        """Real tokens of each of ``batch`` sequences so far, int64 [B]."""
        return self._seen if self._groups else torch.zeros(batch, dtype=torch.int64)

    def _resolve(self, after: Tensor) -> Plan:
        """The plan of a pass after which sequences have ``after`` (int64 [B]) tokens."""
        planner = self._planner(after, empty=not self._groups and bool((after >= self._expected).all()))
        if self._bounded:
            return planner.plan()
        return planner.planned(torch.full((len(self.spec.layers), len(after), planner.heads.kv_heads), UNBOUNDED))

    def _with_peak(self, plan: Plan, step: Step, tokens: int) -> Plan:
        """``plan`` with its peak in a pass of ``tokens`` tokens, or that of the passes before where it was higher."""
        held = None
        if bool(step.before.any()):
            held = torch.zeros_like(plan.capacity)
            for group in self._groups:
                if group.layer.window is None:
                    held[group.numbers] = group.entries()
        decodes = not all(group.reads_prompts for group in self._groups)
        peak = self._planner(step.after, empty=False).peak(plan.capacity, tokens, held, decodes).tolist()
        if held is not None and self.plan and self.plan.peak:
            peak = [max(both) for both in zip(peak, self.plan.peak, strict=True)]
        return replace(plan, peak=peak)

    def _planner(self, after: Tensor, empty: bool) -> Planner:
        ends = after.maximum(self._expected)  # of each sequence's prompt
        return self.recipe.planner(self.spec, self.budget, ends.tolist(), self.page_size, empty=empty)

    @property
    def _logical(self) -> int:
        return max(self._passed.tolist(), default=0)

    @property
    def _last_whole_layer(self) -> int:
        return len(self.spec.layers) - len(self._later_layers) - 1

    def _carry(self, chosen: Tensor) -> None:
        """Narrows the pass to the tokens that go on (bool [B, q])."""
        assert self._step is not None
        if bool(chosen.all()):
            return
        carried = self._carried = Carried(chosen, self, self._later_layers)
        positions = carried.narrowed(self._step.positions.expand_as(chosen)).masked_fill(~carried.real, -1)
        padded = not bool(carried.real.all())
        self._step = replace(self._step, positions=positions, padded=padded, carried=carried.counts)

    def _carry_all(self) -> None:
        if self._carried:
            self._carried.remove()
            self._carried = None

    def _end(self) -> None:
        assert self._step is not None
        self._carry_all()
        for group in self._groups:
            if not self._decoding:
                group.end_prompt()
            elif not self._opened:
                group.end_token(self._step)
        self._closing, self._opened = self._opened, None
        self._seen = self._step.after
        if bool((self._seen >= self._expected).all()):
            self._expected = torch.tensor(0)
        self._passed = (self._passed if self._passed.numel() else torch.zeros_like(self._seen)) + self._tokens
        self._step, self._next_layer = None, 0

    def _new_groups(self, batch: int, device: torch.device) -> list[LayerGroup]:
        self._arena = arena = self._shared_arena or Arena(device, self.page_size)
        if arena.device != device:
            raise CacheMismatch(f"the arena is on {arena.device}, and the model's keys are on {device}")
        members: dict[LayerSpec, list[int]] = {}
        for number, layer in enumerate(self.spec.layers):
            members.setdefault(layer, []).append(number)
        return [self._new_group(numbers, layer, arena, batch) for layer, numbers in members.items()]

    def _new_group(self, numbers: list[int], layer: LayerSpec, arena: Arena, batch: int) -> LayerGroup:
        inputs = [each for number in numbers if self._layer_inputs and (each := self._layer_inputs[number])]
        return new_group(self.recipe, numbers, layer, self.spec.dtype, arena, batch, self._rotary, inputs)

    def _check_joins(self, other: "Cache") -> None:
        reasons = {
            "is this cache itself": other is self,
            "was made for another model": other._config is not self._config,
            f"has the recipe {other.recipe} where this one has {self.recipe}": other.recipe != self.recipe,
            "holds nothing": not other._groups,
            "has another arena: make both with the same arena": self._arena is not None
            and other._arena is not self._arena,
            "is in the middle of a pass": any(c._step or c._opened or c._closing or c._parked for c in (self, other)),
        }
        for reason, applies in reasons.items():
            if applies:
                raise CacheMismatch(f"a cache cannot join that {reason}")

    def _check_shapes(self, keys: Tensor, values: Tensor, number: int) -> None:
        if number >= len(self.spec.layers):
            raise CacheMismatch(
                f"layer {number} of a model with {len(self.spec.layers)} layers: made for another model"
            )
        layer = self.spec.layers[number]
        found = (keys.shape[1], keys.shape[3], values.shape[3], keys.dtype)
        expected = (layer.kv_heads, layer.key_size, layer.value_size, self.spec.dtype)
        if found != expected:
            raise CacheMismatch(
                f"layer {number} gave (KV heads, key size, value size, dtype) {found}, and the cache was made for "
                f"{expected}"
            )


def _step(
    before: Tensor, tokens: int, valid: Tensor | None, device: torch.device, following: Tensor | None = None
) -> Step:
    """A pass of ``tokens`` new ones and those ``following``; ``valid`` (bool [B, all of them]): which are real."""
    if valid is None:
        after = before + tokens
        positions = sent(before, device)[:, None] + torch.arange(tokens, device=device)
    else:
        valid = valid.to(device)
        after = before + valid[:, :tokens].sum(1).cpu()
        positions = _counted(before, valid[:, :tokens])
    step = Step(positions, before, after, padded=valid is not None)
    return step if following is None else replace(step, following=_counted(after, following.to(device)))


def _counted(before: Tensor, valid: Tensor) -> Tensor:
    """Positions of tokens after ``before`` ([B]) others, -1 where not ``valid`` ([B, q])."""
    return (before.to(valid.device)[:, None] + valid.cumsum(1) - 1).masked_fill(~valid, -1)


def _use_kvarn(model: PreTrainedModel) -> None:
    if model.config._attn_implementation != NAME:
        model.set_attn_implementation(NAME)
    if model.config.get_text_config(decoder=True)._attn_implementation != NAME:
        raise Unsupported(
            f"{type(model).__name__} does not let its attention be replaced (it does not use transformers' attention "
            "interface), so kvarn cannot serve it"
        )


def _check_reading(recipe: Recipe, block: int | None, text: Tensor | None) -> None:
    if block is not None and block < 1:
        raise RecipeError(f"block={block}: prompts are read at least 1 token at a time")
    if block is not None and recipe.propagation is not None:
        raise RecipeError(f"{recipe} leaves tokens of a prompt behind, which must be read at once: leave block out")
    if text is not None and recipe.tail is None:
        raise RecipeError(f"{recipe} scores prompts by their own queries: leave text out, or use epicache")
    if text is not None and (text.dim() != 1 or not text.numel() or text.dtype != torch.int64):
        raise RecipeError(f"text is token ids, int64 [n], not {text.dtype} {list(text.shape)}")


def _refuse_idle(recipe: Recipe, spec: ModelSpec) -> None:
    if recipe.names != ["full"] and all(layer.window is not None for layer in spec.layers):
        raise Unsupported(
            f"every layer of this {spec.architecture} has a sliding window of {spec.layers[0].window} tokens, which "
            f"bounds its cache already; {recipe} acts on full-attention layers only. Use 'full', or set "
            "config.sliding_window = None if your prompts are shorter"
        )
