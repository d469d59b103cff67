"""Every key of a config, with its default, its unit and the reason for it. Other configs start here and override keys.

from hybrid_attn.configs import base
def get_config(size="small"):
    c = base.get_config()
    c.model.d_model = 512
    return c
"""

from ml_collections import ConfigDict


def kind(**changes) -> ConfigDict:
    """A layer type: attention to the whole prefix without positions, with `changes` on top."""
    k = ConfigDict()
    k.mixer = "attention"  # how tokens exchange information; the names are those of `MIXERS` in hybrid_attn/model/block.py
    k.mlp = "gated"  # the feed-forward; the names are those of `MLPS` there
    k.window = None  # keys that a query sees, itself included; None = the whole prefix
    k.chunk = None  # tokens; a query sees only keys of its own chunk (Llama 4); not together with a window
    k.rope_theta = None  # base of the rotary frequencies; None = no positions (NoPE)
    k.rope_fraction = 1.0  # share of a head's dimensions that is rotated
    k.rope_scaling = ConfigDict()
    k.rope_scaling.type = "none"  # none | linear | ntk | yarn | llama3
    k.rope_scaling.factor = 1.0  # target length over original length
    k.rope_scaling.original_len = 8192  # tokens that the frequencies were trained at
    k.rope_scaling.low = 1.0  # yarn: beta_slow; llama3: low_freq_factor (turns over original_len)
    k.rope_scaling.high = 32.0  # yarn: beta_fast; llama3: high_freq_factor
    k.rope_scaling.attention_factor = None  # yarn: scale of cos and sin; None = 0.1 ln(factor) + 1
    k.qk_norm = "none"  # none | layernorm | rms | rms_plus1 | rms_weightless
    k.qk_norm_scope = "head_dim"  # weight: head_dim (shared by heads) | head (one per head) | projection (norm over all heads)
    k.qk_norm_after_rope = False  # norms are usually taken before the rotation; Llama 4 after
    k.scale = None  # factor on q.k; None = head_dim ** -0.5
    k.softcap = None  # scores become cap * tanh(score / cap) (Gemma 2)
    k.temperature = ConfigDict()
    k.temperature.type = "none"  # none | log_length (SWAN) | steps (Llama 4) | learned (SSMax)
    k.temperature.scale = 0.1  # steps: the coefficient; learned: the initial s
    k.temperature.length = 8192  # tokens; log_length: the offset a; steps: tokens per step
    k.sink = False  # a learned logit per head that takes part in the softmax (gpt-oss)
    k.gate = "none"  # none | head | projection: sigmoid gate on the attention output
    for key, value in changes.items():
        k[key] = value
    return k


def source(**changes) -> ConfigDict:
    """A source of documents, by default this interpreter's standard library, or a synthetic task; with `changes` on top."""
    s = ConfigDict()
    s.paths = ()  # patterns of files, or directories, as prepare_data reads them; without any and a store, the standard library
    s.store = None  # token store that tools/prepare_data.py wrote: a directory or a URL such as gs://bucket/corpus
    s.min_length = 0  # tokens; shorter documents are left out, as for an extension stage
    s.label = None  # only documents of that label; None = all
    # A synthetic task instead of documents: new sequences for every step, from half of seq_len tokens up to all, with a loss on
    # answers only. recall: pairs in noise, then queries. mqar: multi-query associative recall. copy: letters, twice. tracking:
    # chains of assignments in noise, then the variables that hold a value.
    s.task = None  # recall | mqar | copy | tracking; None = documents
    s.pairs = 4  # (key, value) pairs in a sequence of recall or mqar; chains in one of tracking
    for key, value in changes.items():
        s[key] = value
    return s


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.seed = 0  # of the parameters; other seeds have keys of their own

    m = c.model = ConfigDict()
    m.vocab_size = 384  # 256 bytes, BOS and EOS, padded to a multiple of 128 so that any tensor axis divides it
    m.pattern = "LLLG"  # one letter a layer, repeated: three local layers to one global (arXiv 2501.18795)
    m.num_layers = 4
    m.d_model = 128
    m.num_heads = 2
    m.num_kv_heads = 1
    m.head_dim = 32
    m.d_ff = 384  # gated feed-forward; 3 * d_model has as many parameters as a plain one of 4.5 * d_model
    m.block = "parallel"  # parallel (Command R) | pre (Llama) | post (OLMo 2) | sandwich (Gemma)
    m.norm = "layernorm"  # layernorm without bias | rms | rms_plus1 (weight stored as w - 1)
    m.norm_eps = 1e-5
    m.activation = "silu"  # silu | gelu | gelu_tanh
    m.rope_layout = "interleaved"  # interleaved pairs (2i, 2i+1) (Cohere) | half: pairs (i, i + H/2) (Llama)
    m.tie_embeddings = True
    m.embed_scale = 1.0
    m.logit_scale = 1.0  # Command R7B: 0.25
    m.logit_softcap = None  # Gemma 2: 30
    m.init_std = 0.08  # of a normal; about d_model ** -0.5: at 0.02 a narrow model learns to attend too slowly
    m.kinds = ConfigDict()
    m.kinds.L = kind(
        window=512, rope_theta=10_000.0
    )  # theta stays at 10k: raising it hurts a hybrid (paper, table of RNoPE variants)
    m.kinds.G = kind(qk_norm="rms")  # NoPE; QK-norm with a weight per head dimension keeps small runs stable at high rates

    c.mesh = ConfigDict()
    c.mesh.slice = 1  # replicas on TPU slices of their own, joined by the data-centre network; elsewhere more of data
    c.mesh.data = -1  # replicas within a slice; -1 = the devices left over
    c.mesh.fsdp = 1  # shards of parameters and optimiser state; the batch is split over slice * data * fsdp
    c.mesh.context = 1  # shards of the sequence
    c.mesh.tensor = 1  # shards of heads, feed-forward and vocabulary

    c.data = ConfigDict()
    c.data.sources = ConfigDict({"text": source()})  # by name; a stage's mixture weighs them
    c.data.tokenizer = "bytes"  # "bytes", or the path of a tokenizer.json
    c.data.holdout = 0.1  # share of held-out documents, by a hash of their text: copies of a document stay together
    # concat: documents back to back, cut at the ends of packed sequences. best_fit: a document that fits is not cut; sequences
    # end with some padding.
    c.data.packing = "concat"  # concat | best_fit
    c.data.seed = 0  # order of the documents
    c.data.prefetch = 2  # batches read ahead, each by a thread of its own

    o = c.optim = ConfigDict()
    o.optimiser = "adamw"  # the names are those of `OPTIMISERS` in hybrid_attn/train/optim.py
    o.lr = 6e-3  # peak; small models bear high rates
    o.b1 = 0.9
    o.b2 = 0.95  # shorter memory than 0.999: the usual choice for language models
    o.eps = 1e-8
    o.weight_decay = 0.1  # not on norms and embeddings
    o.clip_norm = 1.0  # of the global gradient norm
    o.schedule = "cosine"  # cosine | wsd: constant, then a linear decay
    o.warmup_steps = 20
    o.decay_fraction = 0.2  # wsd: share of all steps in the final decay
    o.final_lr_ratio = 0.1  # last learning rate over peak
    o.z_loss = 0.0  # weight of (log sum exp)^2; 1e-4 keeps logits from drifting in long bfloat16 runs

    stage = ConfigDict()
    stage.steps = 300
    stage.seq_len = 8192  # tokens in a packed sequence
    stage.batch = 1  # packed sequences in a step, over all devices
    # Parts of the batch whose gradients are summed one after the other: less memory for activations, the same step.
    stage.microbatches = 1
    stage.objective = "next_token"  # the names are those of `OBJECTIVES` in hybrid_attn/train/objectives/__init__.py
    stage.mixture = ConfigDict()  # source -> weight: its share in the tokens; empty = the only source
    c.stages = [stage]

    t = c.train = ConfigDict()
    t.dtype = "auto"  # of activations: auto = bfloat16 on TPU and GPU, float32 on CPU
    # Residuals of a layer for the backward pass, for all layer types or by letter ("L=none,G=offload"; the others: layer).
    # none: all activations. layer: the layer's input; the layer is recomputed. attention: also the output of attention, which
    # is not recomputed. offload: as attention, in host memory.
    t.remat = "layer"  # layer | none | attention | offload
    # Context parallelism where mesh.context splits the sequence, for all layer types or by letter ("G=ring"; the others: auto).
    # halo: the neighbours' keys in the window or the chunk. gather: all-gather of keys. ring: all keys, one shard at a time.
    # ulysses: all-to-all from tokens to heads. auto: halo with a window or a chunk, else gather.
    t.context = "auto"  # auto | halo | gather | ring | ulysses
    t.zigzag = True  # each context shard has an early and a late part of the sequence, which balances causal work
    # auto = splash on TPU, tokamax on GPU (blocked, with a warning, where it is not installed), blocked on CPU
    # reference is float32 and materialises T x S: for tests. cudnn supports one document per sequence. See docs/kernels.md
    t.kernel = "auto"  # auto | blocked | splash | tokamax | cudnn | reference
    t.loss_chunk = 1024  # tokens whose logits exist at a time on one device
    # Tokens whose feed-forward activations exist at a time on one device; the backward pass recomputes those of a chunk.
    # None: 512 on a CPU, where a chunk fits in the cache, else all tokens. A number bounds [B, T, d_ff] at extreme lengths.
    t.mlp_chunk = None
    t.log_every = 10  # steps
    t.checkpoint_every = 100  # steps
    t.keep = 2  # number of checkpoints to keep

    e = c.evals = ConfigDict()
    # position: held-out loss by position, for each source of documents in the last stage. recall: accuracy on each of its
    # synthetic tasks. needle: retrieval of one number and of four from five depths of a text. ruler: RULER's tasks without the
    # last two, which need files. attention_mass: attention of a question about a needle, by head. key_tokens: loss on tokens
    # that only the far context makes likely. Haystacks are held-out text, or else Python's standard library; in bytes, a
    # question about four numbers needs some 800 tokens and RULER some 1,900. tools/evaluate.py measures checkpoints.
    e.names = ("position", "recall")  # position | recall | needle | ruler | attention_mass | key_tokens
    e.every = None  # steps between two evaluations; None = only when training ends
    e.lengths = (1.0, 2.0)  # in multiples of the last stage's seq_len
    e.tokens = 131_072  # tokens of held-out text, or of synthetic sequences, at each length for position, recall and key_tokens
    e.samples = 5  # questions at each length: for each depth of needle, for each task of ruler
    return c
