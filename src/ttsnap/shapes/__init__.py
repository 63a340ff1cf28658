"""The embedded world: coloured shapes, with an exact checker, a tiny FLUX that paints them and a reward that judges."""
