"""What ``fewstep fid`` is made of.

``settings`` says what is evaluated; ``references`` reads what it is compared with; ``chunks`` and ``folder`` keep what
is done, so that a killed run goes on; ``run`` makes and measures the images, on as many processes as there are;
``comparison`` measures images that exist already; ``report`` and ``plot`` write the figures; ``stopwatch`` tells where
the time goes.
"""
