package dev.engraft;

/** Facts about a model. */
public final class ModelInfo {
    /** Tokens of the vocabulary. */
    public int vocab;
    /** Width. */
    public int dModel;
    /** Transformer blocks. */
    public int nLayers;
    /** Query heads. */
    public int nHeads;
    /** Key and value heads. */
    public int nKvHeads;
    /** Width of the MLP. */
    public int dFf;
    /** Positions that it was trained on. */
    public int contextLength;
    /** Weights. */
    public long parameters;
    /** Bytes of the file that are mapped: clean pages, which the system may drop. */
    public long mappedBytes;
    /** Bytes of private memory, without the tokenizer. */
    public long privateBytes;
    /** Bytes of private memory that the tokenizer takes once needed. */
    public long tokenizerBytes;

    ModelInfo() {}
}
