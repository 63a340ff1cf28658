"""A reward for the tests: how bright a picture is."""


def brightness(images, prompts, *, sigma):
    return images.mean(dim=(1, 2, 3))
