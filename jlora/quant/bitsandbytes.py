"""bitsandbytes' layout of quantised weights in safetensors files."""
