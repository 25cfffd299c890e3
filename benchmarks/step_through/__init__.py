"""The blocks of a layer and what they touch, from traces of the emulator: a page with sliders, and a picture."""
