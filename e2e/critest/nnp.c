/* The program of the image nonewprivs: setuid root, it prints the user it acts as. */
#include <stdio.h>
#include <unistd.h>

int main(void)
{
	printf("Effective uid: %d\n", (int)geteuid());
	return 0;
}
