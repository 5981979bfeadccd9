"""All layers of a decoder in one call; the reference is the decoder's own way, one by one."""
