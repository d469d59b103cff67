"""Every key of a config, with its default, its unit and the reason for it. Other configs start here and override.

from hybrid_attn.configs import base
def get_config(size="small"):
    c = base.get_config()
    c.model.d_model = 512
    return c
"""

from ml_collections import ConfigDict


def kind(**changes) -> ConfigDict:
    """A kind of layer: whole prefix, no positions, nothing else, with `changes` on top."""
    k = ConfigDict()
    k.window = None  # keys that a query sees, itself included; None = the whole prefix
    k.chunk = None  # tokens; a query sees only keys of its own chunk (Llama 4); not together with a window
    k.rope_theta = None  # base of the rotary frequencies; None = no positions (NoPE)
    k.rope_fraction = 1.0  # share of a head's dimensions that is rotated
    k.rope_scaling = ConfigDict()
    k.rope_scaling.type = "none"  # none | linear | ntk | yarn | llama3
    k.rope_scaling.factor = 1.0  # how many times the original length is wanted
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
    """A source of documents, the sources of this interpreter's standard library, or of a task; with `changes` on top."""
    s = ConfigDict()
    s.paths = ()  # patterns of files, or directories, as prepare_data reads them; without any and a store, the standard library
    s.store = None  # token store that tools/prepare_data.py wrote: a directory or a URL such as gs://bucket/corpus
    s.min_length = 0  # tokens; shorter documents are left out: a share of long ones for an extension stage
    s.label = None  # only documents of that label; None = all
    # Instead of documents, rows that are drawn anew for every step, have from half of seq_len tokens up to all of them, and
    # train on answers alone. recall: pairs in noise, then queries. mqar: multi-query associative recall. copy: letters, twice.
    # tracking: chains of assignments in noise, then who holds a value.
    s.task = None  # recall | mqar | copy | tracking; None = documents
    s.pairs = 4  # (key, value) pairs in a row of recall or mqar; chains in one of tracking
    for key, value in changes.items():
        s[key] = value
    return s


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.seed = 0  # parameters; every other seed is its own key

    m = c.model = ConfigDict()
    m.vocab_size = 384  # 256 bytes and 2 document marks, padded to a multiple of 128 so that any tensor axis divides it
    m.pattern = "LLLG"  # one letter a layer, repeated: three local layers to one global (arXiv 2501.18795)
    m.num_layers = 4
    m.d_model = 128
    m.num_heads = 2
    m.num_kv_heads = 1
    m.head_dim = 32
    m.d_ff = 384  # gated feed-forward; 3 * d_model has the parameters of a plain one of 4.5 * d_model
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
    c.data.holdout = 0.1  # share of the documents held out, by a hash of their text: copies of a document stay together
    # concat: documents back to back, cut at row edges. best_fit: no document that fits a row is cut; rows end in some padding
    c.data.packing = "concat"  # concat | best_fit
    c.data.seed = 0  # order of the documents
    c.data.prefetch = 2  # batches read ahead, each by a thread of its own

    o = c.optim = ConfigDict()
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
    stage.seq_len = 8192  # tokens in a row
    stage.batch = 1  # rows in a step, over all devices
    # Parts of the batch whose gradients are summed one after the other: less memory for activations, the same step.
    stage.microbatches = 1
    stage.mixture = ConfigDict()  # source -> weight: its share in the tokens; empty = the only source
    c.stages = [stage]

    t = c.train = ConfigDict()
    t.dtype = "auto"  # of activations: auto = bfloat16 on TPU and GPU, float32 on CPU
    # What the backward pass finds of a layer, for every kind of layer or by letter ("L=none,G=offload"; the others: layer).
    # none: all of it. layer: its input; the rest is computed again. attention: also what its attention gave, which is then not
    # computed again. offload: the same, and it waits in the host's memory.
    t.remat = "layer"  # layer | none | attention | offload
    # How a kind of layer attends where mesh.context splits the sequence, for every kind or by letter ("G=ring"; the others:
    # auto). halo: keys of the neighbours that the window or the chunk reaches. gather: all keys. ring: all keys, one shard's at
    # a time. ulysses: shards trade tokens for heads. auto: halo where there is a window or a chunk, else gather.
    t.context = "auto"  # auto | halo | gather | ring | ulysses
    t.zigzag = True  # each context shard has an early and a late part of the row, so that causal work is equal
    # auto = splash on TPU, tokamax on GPU (blocked, with a warning, where it is not installed), blocked on CPU
    # reference is float32 and materialises T x S: tests only. cudnn takes one document a row. See docs/kernels.md
    t.kernel = "auto"  # auto | blocked | splash | tokamax | cudnn | reference
    t.loss_chunk = 1024  # tokens whose logits exist at a time on one device
    # Tokens whose feed-forward exists at a time on one device; a chunk's hidden activations are computed again backward.
    # None: 512 on a CPU, where a chunk stays in cache, else whole rows. A number bounds [B, T, d_ff] at extreme lengths.
    t.mlp_chunk = None
    t.log_every = 10  # steps
    t.checkpoint_every = 100  # steps
    t.keep = 2  # checkpoints kept

    e = c.evals = ConfigDict()
    # position: held-out loss by position, of each source of documents in the last stage. recall: right answers in rows of each
    # of its tasks. needle: one number and four, hidden at five depths of a text and asked for. ruler: RULER's tasks but the
    # last two, which need files. attention_mass: where a question about a needle looks, by head. key_tokens: loss on tokens
    # that only the far context makes likely. Needles lie in held-out text, or where there is none in Python's standard library;
    # in bytes a question about four needs some 800 tokens, and RULER some 1,900. tools/evaluate.py asks this of checkpoints.
    e.names = ("position", "recall")  # position | recall | needle | ruler | attention_mass | key_tokens
    e.every = None  # steps between two evaluations; None = only when training ends
    e.lengths = (1.0, 2.0)  # in multiples of the last stage's seq_len
    e.tokens = 131_072  # at each length, of position, recall and key_tokens: scored, or in the rows whose answers are
    e.samples = 5  # questions of needle at each length and depth, and of each task of ruler at each length
    return c
