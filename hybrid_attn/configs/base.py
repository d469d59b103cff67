"""Every key of a config, with its default, its unit and its reason. Other configs start from this one and override keys.

from hybrid_attn.configs import base
def get_config(size="small"):
    c = base.get_config()
    c.model.d_model = 512
    return c
"""

import functools

from ml_collections import ConfigDict


def kind(**changes) -> ConfigDict:
    """A layer type: full causal attention without positions or other options, except for `changes`."""
    k = ConfigDict()
    k.mixer = "attention"  # how tokens exchange information: a name in `MIXERS` of hybrid_attn/model/transformer.py
    k.attention_experts = 4  # of the mixer attention_experts: so many attentions compute every token (BAM)
    k.share_kv = None  # whether these share keys and values; None = where they see all earlier keys, for the cache's sake
    k.mlp = moe(type="gated")  # the feed-forward
    k.window = None  # number of keys that a query sees, itself included; None = all earlier keys
    k.chunk = None  # tokens; a query sees only keys of its own chunk (Llama 4); excludes a window
    k.rope_theta = None  # base of the rotary frequencies; None = no positions (NoPE)
    k.rope_fraction = 1.0  # fraction of the dimensions of a head that are rotated
    k.rope_scaling = ConfigDict()
    k.rope_scaling.type = "none"  # none | linear | ntk | yarn | llama3
    k.rope_scaling.factor = 1.0  # new length / original length
    k.rope_scaling.original_len = 8192  # tokens; the length that the frequencies were trained at
    k.rope_scaling.low = 1.0  # yarn: beta_slow; llama3: low_freq_factor (turns over original_len)
    k.rope_scaling.high = 32.0  # yarn: beta_fast; llama3: high_freq_factor
    k.rope_scaling.attention_factor = None  # yarn: scale of cos and sin; None = 0.1 ln(factor) + 1
    k.rope_scaling.truncate = True  # yarn: whether the ends of its ramp are whole dimensions (gpt-oss: False)
    # Tokens of a causal convolution on the input of the mixer: each token becomes itself plus a weighted sum of itself and the
    # tokens right before it (Canon-A, arXiv 2512.17351: 4). Each dimension has its own weights, which start at zero.
    k.short_conv = None  # None = no convolution
    k.qk_norm = "none"  # none | layernorm | rms | rms_plus1 | rms_weightless
    k.qk_norm_scope = "head_dim"  # weight: head_dim (shared by heads) | head (one per head) | projection (norm over all heads)
    k.qk_norm_after_rope = False  # usually norms are applied before RoPE; in Llama 4 after it
    k.scale = None  # factor on q.k; None = head_dim ** -0.5
    k.softcap = None  # scores become cap * tanh(score / cap) (Gemma 2)
    k.temperature = ConfigDict()
    k.temperature.type = "none"  # none | log_length (SWAN) | steps (Llama 4) | position_steps (Ministral 3) | learned (SSMax)
    k.temperature.scale = 0.1  # steps of both kinds: the coefficient; learned: the initial s
    k.temperature.length = 8192  # tokens; log_length: the offset a; steps of both kinds: the tokens per step
    k.sink = False  # a learned logit per head that takes part in the softmax (gpt-oss)
    k.gate = "none"  # none | head | projection: sigmoid gate on the attention output
    k.attention_bias = False  # biases of queries, keys, values and output (gpt-oss)
    k.residual_scale = 1.0  # factor on what the mixer and the feed-forward add to the residual stream (Granite: 0.22)
    k.update(changes)
    return k


def moe(**changes) -> ConfigDict:
    """The feed-forward of a layer type: a mixture of experts, except for `changes`."""
    m = ConfigDict()
    m.type = "moe"  # gated | moe: a name in `MLPS` of hybrid_attn/model/transformer.py
    m.d_ff = None  # the width of a gated feed-forward, and of each expert; None = that of the model
    # The gate is at most the limit, and up within it on both sides; the product is gate * sigmoid(alpha * gate) * (up + 1).
    m.swiglu_limit = None  # gpt-oss: 7; None = activation(gate) * up
    m.swiglu_alpha = 1.702  # with a limit
    # What follows is of moe alone.
    m.experts = 8
    m.top_k = 2  # experts that compute a token
    m.router = "softmax"  # softmax | sigmoid: how logits, always in float32, become scores
    m.renormalise = True  # the scores of a token's experts are divided by their sum (Mixtral)
    m.route_scale = 1.0  # factor on them afterwards (DeepSeek-V3: 2.5)
    m.biases = False  # biases of the router, and of the three products of each expert (gpt-oss)
    m.shared_experts = 0  # experts that compute every token
    m.shared_d_ff = None  # the width of each of them; None = that of the others
    m.shared_combine = "sum"  # sum | average: of the chosen ones and the shared ones, half the sum of both
    m.shared_gate = False  # a sigmoid gate, one number for each token, on the shared ones (Qwen2-MoE)
    m.balance_loss = 0.01  # weight of the load-balance loss (Switch Transformer, arXiv 2101.03961)
    m.bias_rate = None  # a step moves each expert's bias by so much (DeepSeek-V3: 0.001); None = no bias, 0 = a fixed one
    m.bias_on = "score"  # score | logit: what the bias is added to when experts are chosen (Kolibri: logit)
    m.z_loss = 0.001  # weight of (log sum exp)^2 of the router's logits (ST-MoE, arXiv 2202.08906)
    m.domain_dim = None  # the size of domain embeddings, of which the router is projected (Nexus); None = a matrix of its own
    m.update(changes)
    return m


def adapter(**changes) -> ConfigDict:
    """Weights beside the matrices of a model, which train while the model stays as it is; none without `changes`."""
    a = ConfigDict()
    a.type = None  # lora | ia3 | mov | molora: a name in `TRANSFORMS` of hybrid_attn/model/transforms; None = no adapter
    # The matrices that get one, by name, such as periods/L0/attention/q, or by pattern; the default is that of the LoRA paper.
    a.targets = ("*/attention/q", "*/attention/v")
    a.rank = 8  # of lora and molora
    a.alpha = 16.0  # of these too: the product of the two small matrices is multiplied by alpha / rank
    a.experts = 10  # vectors of mov, and pairs of small matrices of molora, that a router mixes for each token
    a.update(changes)
    return a


def low_rank(**changes) -> ConfigDict:
    """Matrices that are products of two factors; none without `changes`."""
    f = ConfigDict()
    f.rank_fraction = None  # the rank over the shorter side of the matrix, at most 1; None = all matrices are dense
    # The matrices, by name or pattern. Those of keys and values are small already where few heads share them.
    f.targets = ("*/attention/q", "*/attention/o", "*/mlp/*")
    # spectral: the largest singular vectors and values of the dense matrix's initial value. spectral_ones: the values are 1.
    # he: each factor from N(0, 2 / fan-in).
    f.init = "spectral"  # spectral | spectral_ones | he
    f.update(changes)
    return f


def source(**changes) -> ConfigDict:
    """A source of documents or of a synthetic task; without `changes`, the sources of Python's standard library."""
    s = ConfigDict()
    s.paths = ()  # file patterns or directories, as in tools/prepare_data.py; without these and a store: the standard library
    s.store = None  # token store of tools/prepare_data.py: a directory or a URL such as gs://bucket/corpus
    s.min_length = 0  # tokens; shorter documents are left out, for example in a stage of context extension
    s.label = None  # only documents with this label; None = all
    # Synthetic sequences instead of documents. They are new in every step, have seq_len / 2 to seq_len tokens, and only their
    # answers have a loss. recall: pairs in noise, then queries. mqar: multi-query associative recall. copy: letters, twice.
    # tracking: chains of assignments in noise, then the variables with a value. needle: of the documents that the source would
    # have, one or several in a sequence, with numbers hidden in them and questions about these at the end of each.
    s.task = None  # recall | mqar | copy | tracking | needle; None = documents
    # (key, value) pairs in a sequence of recall or mqar; chains in one of tracking; at most so many needles in a document
    s.pairs = 4
    s.update(changes)
    return s


def lr_schedule(**changes) -> ConfigDict:
    """The learning rate of a stage, in place of that of `optim`; every stage has one, or none has."""
    r = ConfigDict()
    r.shape = "linear"  # cosine | wsd | linear | constant | inverse_sqrt
    r.start = None  # after the warm-up; None = the last rate of the stage before
    r.end = None  # the last rate; needed by cosine, wsd and linear
    r.warmup_steps = 0  # from the last rate of the stage before, or 0 in the first
    # With a number (0: no warm-up) the rate follows the tokens of the stage, not its steps: warm-up, shape and decay_fraction.
    r.warmup_tokens = None
    r.decay_fraction = 0.2  # wsd: fraction of the steps of the stage in the decay
    r.decay_shape = "linear"  # wsd: linear | sqrt | exponential
    r.jump = False  # True: start need not be the last rate of the stage before
    r.update(changes)
    return r


def stage(**changes) -> ConfigDict:
    """A stage of 300 steps of one sequence of 8,192 tokens, except for `changes`."""
    s = ConfigDict()
    s.name = None  # in the lines and records of its steps, such as "cooldown"; None = its number, from 1
    s.steps = 300
    s.tokens = None  # instead of steps (None): the stage ends with the step that has seen so many, padding included
    s.seq_len = 8192  # tokens in a packed sequence
    s.batch = 1  # packed sequences in a step, over all devices
    # Smaller batches that the stage begins with, such as (3072, 6144, 9216) before 12,288. Each lasts an equal share of
    # batch_ramp_tokens, to the step that completes it, and is compiled by itself. A smaller batch has fewer microbatches.
    s.batch_ramp = ()
    s.batch_ramp_tokens = None  # tokens of the whole ramp
    # Parts of the batch whose gradients are accumulated one after the other: less memory for activations, the same step.
    s.microbatches = 1
    s.mixture = ConfigDict()  # source -> weight, its share of the tokens; empty = the only source
    s.objective = "next_token"  # next_token | sft | dpo | ipo | hinge | trl_ipo | trl_hinge, and those that you add
    s.average_over = "tokens"  # the loss of sft: tokens | documents
    s.preference = None  # preference(...), for dpo, ipo, hinge, trl_ipo and trl_hinge
    # Fields of the model, such as "model.kinds.L.rope_theta", that may differ from the checkpoint that the stage continues.
    # They change what the parameters compute: a resumed run refuses other values unless they are named here.
    s.model_changes = ()
    s.lr_schedule = None  # lr_schedule(...): the learning rate of this stage; None = that of optim
    # Keys of the config that have another value in this stage: override({"model.kinds.L.rope_theta": 1e6, "mesh.context": 4}).
    # They may be of model, mesh, train, data.packing, data.sources.NAME.min_length, and of optim, except where all stages share
    # the value, such as that of train.keep. Of those that change the arrays of the state only model.low_rank.rank_fraction and
    # model.low_rank.targets are possible: docs/low_rank.md
    s.override = ConfigDict()
    # The parameters that this stage trains, by name, such as ("periods/L*", "*/q_norm"); empty = all, or those of
    # model.adapter. The others and their moments keep their bits.
    s.trainable = ()
    # Of dpo and the like, in the last stage: the run ends once so many evaluations of preferences, one every evals.every steps,
    # follow the turn of an indicator of over-optimisation (docs/preferences.md). None = it goes on to its last step.
    s.turn_patience = None
    # The indicator that the run shows: entropy_bits | renormalised_entropy_bits | mass; None = that of the objective
    s.turn_indicator = None
    s.update(changes)
    return s


def preference(**changes) -> ConfigDict:
    """The settings of an objective of pairs of completions, with `changes`; its formulas: docs/preferences.md."""
    p = ConfigDict()
    # Of dpo, ipo (whose paper calls it tau), trl_ipo and trl_hinge: times the difference of log-ratios. None for hinge
    p.beta = 0.1
    p.margin = None  # of hinge: between the log-probabilities of the completions
    p.alpha = None  # of hinge: the weight of what keeps the chosen completion as likely as under the reference
    p.label_smoothing = 0.0  # of dpo: the share of pairs whose completions are taken to be swapped
    p.nll = 0.0  # the weight of the negative log-probability of the chosen completion
    # Log-probabilities of completions are means over their tokens, not sums. None: means for hinge and trl_ipo, sums for others
    p.mean_log_probs = None
    # frozen: the parameters at the beginning of the stage. store: log-probabilities that tools/prepare_references.py wrote
    p.reference = "frozen"
    p.update(changes)
    return p


def override(keys: dict) -> ConfigDict:
    """Keys with dots, such as model.kinds.L.window, and their values, in the nested form of `stages[i].override`."""
    nested = {}
    for key, value in keys.items():
        *groups, last = key.split(".")
        functools.reduce(lambda group, name: group.setdefault(name, {}), groups, nested)[last] = value
    return ConfigDict(nested)


def get_config() -> ConfigDict:
    """One small hybrid model, trained on Python's standard library in one stage."""
    c = ConfigDict()
    c.seed = 0  # of the initial parameters; other seeds have their own keys
    c.init_from = _init_from()
    c.model = _model()
    c.mesh = _mesh()
    c.data = _data()
    c.optim = _optim()
    c.stages = [stage()]
    c.train = _train()
    c.evals = _evals()
    return c


def _init_from() -> ConfigDict:
    """Another checkpoint whose parameters the run starts from, with a new optimiser state; unused once it has its own."""
    i = ConfigDict()
    # A parameter has a name such as periods/L0/attention/q; groups (periods/L0) and patterns (*/q_norm) name several of them.
    i.path = None  # a run's workdir, a directory of checkpoints, an imported model or one checkpoint; None = initial parameters
    i.step = None  # None = the newest checkpoint
    i.new = ()  # parameters of this model that start from their initial values
    i.ignore = ()  # parameters of the checkpoint that are left out
    i.rename = ()  # "OLD -> NEW": parameters (or groups) that have the name OLD in the checkpoint and NEW in this model
    return i


def _model() -> ConfigDict:
    """The architecture."""
    m = ConfigDict()
    m.vocab_size = 384  # 256 bytes, BOS and EOS, padded to a multiple of 128 so that any tensor axis divides it
    m.prefix = ""  # layer types, one letter per layer, of the first layers, before the pattern; num_layers counts them
    m.pattern = "LLLG"  # layer types, one letter per layer, repeated: three local layers to one global (arXiv 2501.18795)
    m.num_layers = 4
    m.d_model = 128
    m.num_heads = 2
    m.num_kv_heads = 1
    m.head_dim = 32
    m.d_ff = 384  # gated feed-forward; 3 * d_model has as many parameters as 4.5 * d_model without a gate
    m.block = "parallel"  # parallel (Command R) | pre (Llama) | post (OLMo 2) | sandwich (Gemma)
    m.norm = "layernorm"  # layernorm (without bias) | rms | rms_plus1 (the weight is stored as w - 1)
    m.norm_eps = 1e-5
    m.activation = "silu"  # silu | gelu | gelu_tanh
    m.rope_layout = "interleaved"  # interleaved pairs (2i, 2i+1) (Cohere) | half: pairs (i, i + H/2) (Llama)
    m.tie_embeddings = True
    m.embed_scale = 1.0
    m.logit_scale = 1.0  # Command R7B: 0.25
    m.logit_softcap = None  # Gemma 2: 30
    m.init_std = 0.08  # standard deviation; about d_model ** -0.5: at 0.02 a narrow model learns attention too slowly
    m.unembed_init_std = None  # that of the table of the logits where embeddings are not tied; None = init_std; 0 suits µP
    # µP: the d_model for which init_std, optim.lr and logit_scale are as they stand here. A model that is m times as wide has
    # matrices of init_std / sqrt(m), lr / m and logits / m: what is tuned at a small width stays good. None = no scaling.
    m.mup_base_width = None
    m.mup_base_depth = None  # the num_layers of which the same holds (CompleteP): branches are divided by the ratio to it
    m.depth_init = False  # matrices that write to the residual stream start at init_std / sqrt(2 num_layers) (GPT-2)
    m.adapter = adapter()  # docs/adapters.md
    m.low_rank = low_rank()  # docs/low_rank.md
    m.kinds = ConfigDict()  # the layer type of each letter of the prefix and the pattern
    # theta stays at 10,000: a larger one makes a hybrid worse (paper, table of RNoPE variants)
    m.kinds.L = kind(window=512, rope_theta=10_000.0)
    m.kinds.G = kind(qk_norm="rms")  # NoPE; QK-norm keeps small runs stable at high learning rates
    return m


def _mesh() -> ConfigDict:
    """Devices along each axis."""
    m = ConfigDict()
    m.slice = 1  # replicas on separate TPU slices, joined by the data-centre network; elsewhere the same as data
    m.data = -1  # replicas within a slice; -1 = all remaining devices
    m.fsdp = 1  # shards of parameters and optimiser state; the batch is split over slice * data * fsdp * expert
    m.expert = 1  # shards of the experts of a layer, and elsewhere the same as fsdp
    m.context = 1  # shards of the sequence, and of parameters and optimiser state: these are split over context * expert * fsdp
    m.tensor = 1  # shards of heads, feed-forward and vocabulary
    return m


def _data() -> ConfigDict:
    """What is read, and how it becomes sequences."""
    d = ConfigDict()
    d.sources = ConfigDict({"text": source()})  # by name; the mixture of a stage has their weights
    d.tokenizer = "bytes"  # "bytes", or the path of a tokenizer.json
    d.holdout = 0.1  # fraction of held-out documents, by a hash of their text: copies of a document stay together
    # concat: documents back to back, cut every seq_len tokens. best_fit: no document that fits seq_len is cut; some padding
    d.packing = "concat"  # concat | best_fit
    d.seed = 0  # order of the documents
    d.prefetch = 2  # batches that are read ahead, each by its own thread
    return d


def _optim() -> ConfigDict:
    """The optimiser and the learning rate."""
    o = ConfigDict()
    # A name in `OPTIMISERS` of hybrid_attn/train/optim.py. muon: matrices by Muon, the others by AdamW at the same rate.
    o.optimiser = "adamw"  # adamw | muon | lion | adafactor
    o.lr = 6e-3  # peak; small models need high rates
    o.b1 = 0.9
    o.b2 = 0.95  # shorter memory than 0.999: the usual choice for language models
    o.eps = 1e-8
    o.momentum = 0.95  # of Muon
    o.moment_dtype = "float32"  # float32 | bfloat16: of the first moment or the momentum; bfloat16 saves 2 bytes a parameter
    o.weight_decay = 0.1  # not on norms and embeddings; a step takes lr * weight_decay of a matrix off it
    # Of factors of model.low_rank: frobenius decays the norm of their product, l2 the norm of each factor.
    o.low_rank_decay = "frobenius"  # frobenius | l2
    # True: a step takes weight_decay times its rate over optim.lr off it (arXiv 2309.14322); lr is then the peak of all stages.
    o.independent_decay = False
    o.clip_norm = 1.0  # largest norm of the gradient of all parameters
    # Of all stages; a stage may have its own. Each shape follows a linear warm-up from 0 and ends with the last step.
    # wsd: constant, then a decay. constant and inverse_sqrt have no last rate of their own.
    o.schedule = "cosine"  # cosine | wsd | linear | constant | inverse_sqrt
    o.warmup_steps = 20
    # With a number (0: no warm-up) the rate follows tokens, not steps: warm-up, shape, decay_fraction. warmup_steps is then 0.
    o.warmup_tokens = None
    o.decay_fraction = 0.2  # wsd: fraction of all steps in the final decay
    o.decay_shape = "linear"  # wsd: linear | sqrt (1 - sqrt of the share done, arXiv 2405.18392) | exponential
    o.final_lr_ratio = 0.1  # last learning rate over peak
    o.z_loss = 0.0  # weight of (log sum exp)^2; 1e-4 keeps logits from drifting in long bfloat16 runs
    # A moving average of the parameters, in the checkpoints too (tools/merge.py --ema makes a model of it): its half-life as a
    # share of the steps done, such as 0.05; None = no average.
    o.ema_half_life = None
    # A step takes no update where its loss or its gradient norm is not finite, or above this multiple of the median of the last
    # 64 steps; 3 leaves ordinary noise alone. None = take every update, and stop where one is not finite.
    o.spike_factor = None
    o.max_consecutive_spikes = 5  # one more stops the run, or rolls it back
    # Steps before the first of too many consecutive spikes: the run goes back to the newest checkpoint that is at least so old,
    # and passes over the batches from there to the last spike. None = it stops.
    o.rollback_steps = None
    return o


def _train() -> ConfigDict:
    """How a step is computed, and what is kept of it."""
    t = ConfigDict()
    t.dtype = "auto"  # of activations: auto = bfloat16 on TPU and GPU, float32 on CPU
    # What is saved of a layer for the backward pass, for all layer types or by letter ("L=none,G=offload"; the others: layer).
    # none: all activations (no rematerialisation). layer: only the input. attention: also the output of attention, so that
    # it is not recomputed. offload: like attention, but in host memory.
    t.remat = "layer"  # layer | none | attention | offload
    # How attention works when mesh.context shards the sequence, for all layer types or by letter ("G=ring"; the others: auto).
    # halo: neighbours exchange the keys within the window or chunk. gather: all-gather of the keys. ring: the keys of one shard
    # at a time. ulysses: all-to-all from sequence shards to head shards. auto: halo with a window or a chunk, else gather.
    t.context = "auto"  # auto | halo | gather | ring | ulysses
    t.zigzag = True  # each context shard has an early and a late part of the sequence, so that causal work is equal
    # auto = splash on TPU, tokamax on GPU (blocked, with a warning, where it is not installed), blocked on CPU
    # reference is float32 and materialises T x S: tests only. cudnn takes one document per sequence. See docs/kernels.md
    t.kernel = "auto"  # auto | blocked | native | splash | tokamax | cudnn | reference
    # The products of experts. tokamax: grouped matmuls, which write arrays of a layer's copies of tokens by the width of an
    # expert. blocked: a loop over blocks of rows. auto: tokamax on a GPU or TPU where it is installed and takes the sizes, else
    # blocked. See docs/moe.md
    t.moe_kernel = "auto"  # auto | blocked | tokamax
    t.loss_chunk = 1024  # tokens whose logits are in memory at a time, per device
    # Tokens whose feed-forward is computed at a time, per device. None: 512 on a CPU, where a chunk stays in cache, else all
    # tokens. A number limits [B, T, d_ff] at extreme lengths, but not with remat none, which keeps all for the backward pass.
    t.mlp_chunk = None
    # Periods of layers in one iteration of the loop over periods. More save copies of activations, and compile longer.
    t.unroll = 1
    # On a TPU weights are gathered and gradients summed while the chip computes, not before and after: libtpu splits these
    # collectives over the matrix products beside them. It costs up to 8% of the peak: docs/results/meshes.md
    t.overlap = True
    # Norms, attention and activations by layer type, from one step in so many: docs/statistics.md. Such a step is a program of
    # its own, compiled beside the other. None = no statistics; 10 costs under 2% of the time.
    t.statistics_every = None
    # With them, effective ranks of the matrices of the layers, from all singular values: for rare steps.
    t.rank_statistics = False
    # Where the numbers can be looked at, beside the JSON lines that every run writes; the last two are extras of pip.
    t.sinks = ("tensorboard",)  # tensorboard | wandb | trackio
    t.log_every = 10  # steps
    t.checkpoint_every = 100  # steps
    t.keep = 2  # number of checkpoints that are kept
    return t


def _evals() -> ConfigDict:
    """What is measured of the model in a training."""
    e = ConfigDict()
    # position: held-out loss by position, for each source of documents in the last stage. recall: accuracy on the synthetic
    # tasks. needle: retrieval of one and of four numbers at five depths of a text. ruler: the tasks of RULER except two that
    # need files. attention_mass: attention weights of questions about a needle, by head. key_tokens: loss on tokens that only
    # distant context makes likely. languages: loss and accuracy of the next token by source. routing: the share of each expert,
    # by layer. preferences: held-out pairs of completions, and indicators of over-optimisation. The text around needles is
    # held-out text, or else Python's standard library; in bytes a question about four needles has about 800 tokens, and one of
    # RULER 1,900. tools/evaluate.py evaluates checkpoints.
    # position | recall | needle | ruler | attention_mass | key_tokens | languages | routing | preferences
    e.names = ("position", "recall")
    e.every = None  # steps between evaluations; None = only at the end of training
    e.lengths = (1.0, 2.0)  # in multiples of the last stage's seq_len
    e.tokens = 131_072  # per length: tokens in the sequences that are scored; needle, ruler and attention_mass ask questions
    e.samples = 5  # questions of needle per length and depth, and of each task of ruler per length
    return e
