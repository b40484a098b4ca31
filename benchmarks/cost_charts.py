"""Charts."""


def draw(points, folder):
    pass
