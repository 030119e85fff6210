"""What ``fewstep generate`` is made of.

``model`` finds and loads a pipeline; ``request`` reads the user's words and checks settings; ``schedulers`` builds the
samplers; ``record`` keeps a run's folder; ``pictures`` writes images and grids; ``run`` makes the images. Of steered
runs, ``steering`` has the table of methods and ``rewards`` the rewards; ``steering_methods`` sets the methods up, and
``steered`` makes the images, whose rewards ``reward_plot`` draws.
"""
