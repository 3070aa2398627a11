"""The Mixture-of-Experts layer: router → dispatch → experts → combine (+ shared experts)."""
