"""Building blocks: normalisation, rotary embedding, feed-forward, mixture of experts, embedding."""
