"""What ``fewstep generate`` is made of.

``model`` finds and loads a pipeline; ``request`` reads the user's words and checks settings; ``schedulers`` builds the
samplers; ``record`` keeps a run's folder; ``pictures`` writes images and grids; ``run`` makes the images.
"""
